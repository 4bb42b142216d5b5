"""Trains every method on every data set from several seeds, and checks the papers' claims.

Methods use the same batches in the same order, and settings that give about the same L0
(plan.py). Data sets are activations of two MiniLM layers and synthetic data with a known
dictionary. Trained SAEs are also upgraded to rational ones, which takes 0.3 times as many steps,
and all training steps are timed. With the defaults, the study takes about two hours.

Results go to bench/results/study: results.json, results.md and a plot per data set. Every result
is saved at once: the same command continues an interrupted study and skips what is done.
"""

import argparse
import hashlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.clock import interleaved, summary
from bench.record import RESULTS, stamp
from fastsae import SAE, load
from fastsae.config import to_dict
from fastsae.data import ActivationShards, ActivationSource, Synthetic
from fastsae.evals import EncoderEffect, downstream, reconstruction, sparse_probing
from fastsae.files import read_json, write_json
from fastsae.train import TrainConfig, Trainer, stored_config
from fastsae.train.log import read_lines
from fastsae.train.run_folder import latest
from fastsae.upgrade import UpgradeConfig, upgrade

from .plan import DATA, METHODS, SEEDS, TEACHERS, Scale, upgrade_config
from .report import report

FOLDER = RESULTS / "study"


class Study:
    """Results by data set, method and seed, in a file that is saved after every run.

    The SAEs are kept in `work`, where upgrades find their teachers and interrupted runs continue.
    A run whose settings have changed is repeated.
    """

    def __init__(self, path: Path, work: Path, scale: Scale):
        self.path, self.work, self.scale = path, work, scale
        self.stamp = stamp()
        self.results: dict[str, Any] = {"scale": vars(scale), "runs": {}, "time": {}}
        if path.exists():
            found = read_json(path)
            if found["scale"] != vars(scale):
                raise ValueError(f"{path} has another scale, {found['scale']}: remove it")
            self.results |= {"runs": found["runs"], "time": found["time"]}

    def known(self, data: str, method: str, seed: int, settings: str) -> bool:
        run = self.results["runs"].get(data, {}).get(method, {}).get(str(seed), {})
        return run.get("settings") == settings

    def keep(self, data: str, method: str, seed: int, settings: str, found: dict[str, Any]) -> None:
        runs = self.results["runs"].setdefault(data, {}).setdefault(method, {})
        runs[str(seed)] = {**found, "settings": settings, "stamp": self.stamp}
        write_json(self.path, self.results)
        shown = {name: found[name] for name in ("fvu", "l0", "dead")}
        print(f"{data} / {method} / seed {seed}: {json.dumps(shown)}", flush=True)

    def folder(self, data: str, method: str, seed: int, settings: str) -> Path:
        return self.work / f"{data}-{method}-{seed}-{settings}".replace(" ", "-").replace(",", "")

    def time(self, data: str, source: ActivationSource, seed: int, rounds: int = 5) -> None:
        """Time every method's step on one data set and seed, if all their runs are still there."""
        runs = self.results["runs"][data]
        folders = {
            method: self.folder(data, method, seed, seeds[str(seed)]["settings"])
            for method, seeds in runs.items()
            if str(seed) in seeds and not method.endswith(", tuned")
        }
        names = [folder.name for folder in folders.values()]
        if self.results["time"].get("runs") == names:
            return
        if missing := [folder.name for folder in folders.values() if not folder.exists()]:
            print(f"steps are not timed: {self.work} lacks {', '.join(missing)}", flush=True)
            return
        methods = seconds_per_million(folders, source, rounds)
        about = {"data": data, "runs": names, "stamp": self.stamp}
        self.results["time"] = about | {"methods": methods}
        write_json(self.path, self.results)

    def train(self, data: str, source: ActivationSource, method: str, seed: int) -> None:
        """Train and measure one method from one seed, unless its result is known."""
        config = METHODS[method].config(DATA[data].k, seed, self.scale)
        settings = digest(config)
        if self.known(data, method, seed, settings):
            return
        out = self.folder(data, method, seed, settings)
        config = replace(config, out=out)
        Trainer(config, source).fit(resume=(out / "config.json").exists())
        self.keep(data, method, seed, settings, self.measure(load(out / "sae"), source, out))

    def tune(self, data: str, source: ActivationSource, teacher: str, seed: int) -> None:
        """Fine-tune a trained SAE unchanged and as a rational one, and measure both."""
        trained = digest(METHODS[teacher].config(DATA[data].k, seed, self.scale))
        config, method = upgrade_config(seed, self.scale), f"RSAE of {teacher}"
        settings = f"{digest(config)}-{trained}"
        if self.known(data, method, seed, settings):
            return
        out = self.folder(data, method, seed, settings)
        config = replace(config, out=out)
        sae = load(self.folder(data, teacher, seed, trained) / "sae")
        upgrade(sae, source, config, resume=(out / "config.json").exists())
        for name, folder in {f"{teacher}, tuned": out / "baseline", method: out}.items():
            found = self.measure(load(folder / "sae"), source, folder)
            self.keep(data, name, seed, settings, found)

    def measure(self, sae: SAE, source: ActivationSource, run: Path) -> dict[str, Any]:
        """All metrics of an SAE."""
        heldout = source.heldout
        assert heldout is not None
        found = reconstruction(sae, heldout, max_tokens=26_000)
        result: dict[str, Any] = {"fvu": found.fvu, "l0": found.l0, "dead": found.dead_fraction}
        result |= {"utilisation": found.utilization}
        result |= {f"pcr{rank}": value for rank, value in found.pc_retention.items()}
        result["curve"] = [[row["step"], row["fvu"]] for row in read_lines(run / "metrics.jsonl")]
        if isinstance(heldout, ActivationShards):
            effect = downstream(sae, heldout, max_windows=self.scale.windows)
            assert isinstance(effect, EncoderEffect)
            result["cosine"] = effect.cosine
            probing = sparse_probing(sae, heldout)
            result |= {f"probing{k}": value for k, value in probing.accuracy.items()}
            result |= {f"raw probing{k}": value for k, value in probing.baseline.items()}
        if isinstance(source, Synthetic):
            result["recovery"] = source.recovery(sae.W_dec)
        return result


def seconds_per_million(
    runs: dict[str, Path], source: ActivationSource, rounds: int
) -> dict[str, dict[str, float]]:
    """Median, min and max seconds per million tokens, by method, from their run directories.

    A step repeats one batch from the last checkpoint, with its dead latents and a learning rate of
    0, so that L0 stays the same. Loading data does not count.
    """
    with tempfile.TemporaryDirectory() as folder:
        steps = {
            method: step_of(run, source, Path(folder) / str(number))
            for number, (method, run) in enumerate(runs.items())
        }
        times = interleaved(steps, rounds)
    tokens = {method: stored_config(run).batch_size for method, run in runs.items()}
    return {m: summary([1e3 * t / tokens[m] for t in found]) for m, found in times.items()}


def step_of(run: Path, source: ActivationSource, out: Path) -> Callable[[], object]:
    """A training step that continues the run in a directory."""
    out.mkdir()
    trainer = Trainer(replace(stored_config(run), out=out), source)
    state = trainer.start(resume=False, checkpoint=latest(run))
    with trainer.batches(state) as batches:
        batch = trainer.load(batches, state)
    return lambda: trainer.step(state, batch, None)


def digest(config: TrainConfig | UpgradeConfig) -> str:
    """A short hash of all settings."""
    text = json.dumps(to_dict(config), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--work", type=Path, default=Path("runs/study"), help="where SAEs go (default: runs/study)")
    add("--data", nargs="+", choices=DATA, default=list(DATA), help="data sets (default: all)")
    add("--seeds", nargs="+", type=int, default=SEEDS, help="training seeds (default: 0 1 2)")
    add("--steps", type=int, default=Scale.steps, help="training steps (default: 500)")


def bench(arguments: argparse.Namespace) -> None:
    """Train, tune and measure what is missing, then write and print the report."""
    seeds, scale = arguments.seeds, Scale(arguments.steps, max(1, 3 * arguments.steps // 10))
    FOLDER.mkdir(parents=True, exist_ok=True)
    study = Study(FOLDER / "results.json", arguments.work, scale)
    for seed in seeds:
        for name in arguments.data:
            source = DATA[name].open()
            for method in METHODS:
                study.train(name, source, method, seed)
            for teacher in TEACHERS:
                study.tune(name, source, teacher, seed)
    first = arguments.data[0]
    study.time(first, DATA[first].open(), seeds[0])
    print(report(study.results, FOLDER))
