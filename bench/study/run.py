"""Trains and measures what plan.py lists; every result is written as soon as it is known."""

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.record import RESULTS, stamp
from fastsae import SAE, load
from fastsae.config import to_dict
from fastsae.data import ActivationShards, ActivationSource, Synthetic
from fastsae.evals import EncoderEffect, downstream, reconstruction, sparse_probing
from fastsae.files import read_json, write_json
from fastsae.train import TrainConfig, Trainer
from fastsae.train.log import read_lines
from fastsae.upgrade import UpgradeConfig, upgrade

from .plan import DATA, METHODS, SEEDS, TEACHERS, Scale, upgrade_config
from .timing import seconds_per_million

FOLDER = RESULTS / "study"


class Study:
    """Results by data set, method and seed, in a file that survives an interruption.

    The SAEs are kept in `work`, so that upgrades find their teachers; a run that was cut off there
    goes on. A run whose settings have changed since is done again.
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
        found = {"data": data, "runs": names, "methods": methods, "stamp": self.stamp}
        self.results["time"] = found
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
        for name, folder in {
            f"{teacher}, tuned": out / "baseline",
            method: out,
        }.items():
            found = self.measure(load(folder / "sae"), source, folder)
            self.keep(data, name, seed, settings, found)

    def measure(self, sae: SAE, source: ActivationSource, run: Path) -> dict[str, Any]:
        """Everything that is reported of an SAE."""
        heldout = source.heldout
        assert heldout is not None
        found = reconstruction(sae, heldout, max_tokens=26_000)
        result: dict[str, Any] = {
            "fvu": found.fvu,
            "l0": found.l0,
            "dead": found.dead_fraction,
            "utilisation": found.utilisation,
            **{f"pcr{rank}": value for rank, value in found.pc_retention.items()},
            "curve": [[line["step"], line["fvu"]] for line in read_lines(run / "metrics.jsonl")],
        }
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


def digest(config: TrainConfig | UpgradeConfig) -> str:
    """Of all settings, in a few letters."""
    text = json.dumps(to_dict(config), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def bench(work: Path, scale: Scale, data: list[str], seeds: list[int]) -> None:
    from .report import report

    FOLDER.mkdir(parents=True, exist_ok=True)
    study = Study(FOLDER / "results.json", work, scale)
    for seed in seeds or SEEDS:
        for name in data or DATA:
            source = DATA[name].open()
            for method in METHODS:
                study.train(name, source, method, seed)
            for teacher in TEACHERS:
                study.tune(name, source, teacher, seed)
    first = next(iter(data or DATA))
    study.time(first, DATA[first].open(), (seeds or SEEDS)[0])
    print(report(study.results, FOLDER), file=sys.stdout)
