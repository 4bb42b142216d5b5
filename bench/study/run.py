"""Trains and measures what plan.py lists; every result is written as soon as it is known."""

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
    """Results by data set, method and seed, in a file that survives an interruption.

    The SAEs are kept in `work`, so that upgrades find their teachers; a run that was cut off there
    continues. A run whose settings have changed since is done again.
    """

    def __init__(self, path: Path, work: Path, scale: Scale):
        self.path, self.work, self.scale = path, work, scale
        self.stamp = stamp()
        self.results: dict[str, Any] = {"scale": vars(scale), "runs": {}, "time": {}}
        if path.exists():
            found = read_json(path)
            if found["scale"] != vars(scale):
                raise ValueError(f"{path} is of another scale, {found['scale']}: remove it")
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
        name = f"{data}-{method}-{seed}-{settings}".replace(" ", "-").replace(",", "")
        return self.work / name

    def time(self, data: str, source: ActivationSource, seed: int, rounds: int = 5) -> None:
        """Every method's step on one data set, from the SAEs of one seed, if they are here."""
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
            print(f"no timing: {self.work} lacks {', '.join(missing)}", flush=True)
            return
        methods = seconds_per_million(folders, source, rounds)
        about = {"data": data, "runs": names, "stamp": self.stamp}
        self.results["time"] = about | {"methods": methods}
        write_json(self.path, self.results)

    def train(self, data: str, source: ActivationSource, method: str, seed: int) -> None:
        """One method from one seed, unless its result is known."""
        config = METHODS[method].config(DATA[data].k, seed, self.scale)
        settings = digest(config)
        if self.known(data, method, seed, settings):
            return
        out = self.folder(data, method, seed, settings)
        config = replace(config, out=out)
        Trainer(config, source).fit(resume=(out / "config.json").exists())
        self.keep(data, method, seed, settings, self.measure(load(out / "sae"), source, out))

    def tune(self, data: str, source: ActivationSource, teacher: str, seed: int) -> None:
        """A trained SAE fine-tuned as it is, and as a rational one."""
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
        """Everything that is reported of an SAE."""
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
    """Median, least and most seconds per million tokens, by method, from the folders of runs.

    A step is one on the same batch from the last checkpoint, with the dead latents of then and a
    learning rate of 0, so that L0 stays that of the result; loading data is not part of it.
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
    """A training step of the SAE in a run's folder, as that run took it."""
    out.mkdir()
    trainer = Trainer(replace(stored_config(run), out=out), source)
    state = trainer.start(resume=False, checkpoint=latest(run))
    with trainer.batches(state) as batches:
        batch = trainer.load(batches, state)
    return lambda: trainer.step(state, batch, None)


def digest(config: TrainConfig | UpgradeConfig) -> str:
    """Of all settings, in a few letters."""
    text = json.dumps(to_dict(config), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--work", type=Path, default=Path("runs/study"), help="folder for the SAEs")
    add("--data", nargs="+", choices=DATA, default=list(DATA), help="which data sets (all)")
    add("--seeds", nargs="+", type=int, default=SEEDS)
    steps = "of training (500; all of it takes about two hours); 0.3 times as many of fine-tuning"
    add("--steps", type=int, default=Scale.steps, help=steps)


def bench(arguments: argparse.Namespace) -> None:
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
