"""Trains and measures what plan.py lists; every result is written as soon as it is known."""

import json
import sys
from pathlib import Path
from typing import Any

from bench.common import RESULTS, stamp
from fastsae import SAE, load
from fastsae.data import ActivationShards, ActivationSource, Synthetic
from fastsae.evals import EncoderEffect, downstream, reconstruction, sparse_probing
from fastsae.files import read_json, write_json
from fastsae.train import Trainer
from fastsae.train.log import read_lines
from fastsae.upgrade import upgrade

from .plan import DATA, METHODS, SEEDS, TEACHERS, Scale, upgrade_config

FOLDER = RESULTS / "study"


class Study:
    """Results by data set, method and seed, in a file that survives an interruption.

    The SAEs are kept in `work`, so that upgrades find their teachers; a run that was cut off there
    begins again.
    """

    def __init__(self, path: Path, work: Path, scale: Scale):
        self.path, self.work, self.scale = path, work, scale
        self.stamp = stamp()
        self.results: dict[str, Any] = {"scale": vars(scale), "runs": {}}
        if path.exists():
            found = read_json(path)
            if found["scale"] != vars(scale):
                raise ValueError(f"{path} is of another scale, {found['scale']}: remove it")
            self.results["runs"] = found["runs"]

    def known(self, data: str, method: str, seed: int) -> bool:
        return str(seed) in self.results["runs"].get(data, {}).get(method, {})

    def keep(self, data: str, method: str, seed: int, found: dict[str, Any]) -> None:
        runs = self.results["runs"].setdefault(data, {}).setdefault(method, {})
        runs[str(seed)] = {**found, "stamp": self.stamp}
        write_json(self.path, self.results)
        shown = {name: found[name] for name in ("fvu", "l0", "dead", "seconds")}
        print(f"{data} / {method} / seed {seed}: {json.dumps(shown)}", flush=True)

    def folder(self, data: str, method: str, seed: int) -> Path:
        name = f"{data}-{method}-{seed}".replace(" ", "-").replace(",", "")
        return self.work / name

    def train(self, data: str, source: ActivationSource, method: str, seed: int) -> None:
        """One method from one seed, unless its result is known."""
        if self.known(data, method, seed):
            return
        out = self.folder(data, method, seed)
        config = METHODS[method].config(DATA[data].k, seed, self.scale, out)
        Trainer(config, source).fit(resume=(out / "config.json").exists())
        self.keep(data, method, seed, self.measure(load(out / "sae"), source, out))

    def tune(self, data: str, source: ActivationSource, teacher: str, seed: int) -> None:
        """A trained SAE fine-tuned as it is, and as a rational one."""
        if self.known(data, f"RSAE of {teacher}", seed):
            return
        out = self.folder(data, f"RSAE of {teacher}", seed)
        sae = load(self.folder(data, teacher, seed) / "sae")
        config = upgrade_config(seed, self.scale, out)
        upgrade(sae, source, config, resume=(out / "config.json").exists())
        for name, folder in {
            f"{teacher}, tuned": out / "baseline",
            f"RSAE of {teacher}": out,
        }.items():
            self.keep(data, name, seed, self.measure(load(folder / "sae"), source, folder))

    def measure(self, sae: SAE, source: ActivationSource, run: Path) -> dict[str, Any]:
        """Everything that is reported of an SAE."""
        heldout = source.heldout
        assert heldout is not None
        found = reconstruction(sae, heldout, max_tokens=26_000)
        summary = read_json(run / "summary.json")
        result: dict[str, Any] = {
            "fvu": found.fvu,
            "l0": found.l0,
            "dead": found.dead_fraction,
            "utilisation": found.utilisation,
            **{f"pcr{rank}": value for rank, value in found.pc_retention.items()},
            "seconds": 1e6 / summary["tokens_per_second"],
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
    print(report(study.results, FOLDER), file=sys.stdout)
