"""Trains methods in the regimes that decide the papers' claims, from several seeds (plan.py).

Methods use the same batches in the same order. Some take the best learning rate, chosen on a
separate seed. Some trained SAEs are also upgraded to rational ones. Data sets are activations of
MiniLM and SmolLM2, and planted codes, positive and signed. With the defaults, we estimate six
hours on two cores, and minutes on a GPU.

Every SAE has a run directory in --work, with its metrics in study.json: the same command continues
an interrupted study and skips what is done. The results of what was measured, which after --minutes
need not be all, go to bench/results/study, as results.json, results.md and claims.png. With --known
results.json, such results are added to.
"""

import argparse
import hashlib
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from bench.record import RESULTS, stamp
from fastsae import SAE, load
from fastsae.config import to_dict
from fastsae.data import ActivationShards, ActivationSource
from fastsae.files import read_json, write_json
from fastsae.train import TrainConfig, Trainer
from fastsae.upgrade import UpgradeConfig, initial, own_objective, tuning

from .claims import Runs
from .measure import CrossEntropy, measure, tuning_error
from .per_latent import per_latent
from .plan import DATA, SEEDS, TUNING_SEED, Method, Scale
from .plot import plot
from .report import report


class OutOfTime(Exception):
    """No more training is to begin."""


class Study:
    """What is trained on one data set."""

    def __init__(self, name: str, smollm: Path, work: Path, scale: Scale, until: float = math.inf):
        """No training begins after `until`, in seconds of `time.monotonic`."""
        self.plan, self.work, self.scale = DATA[name], work / slug(name), scale
        self.smollm, self.until = smollm, until

    @cached_property
    def source(self) -> ActivationSource:
        """The activations, which need not be there if all runs are known."""
        return self.plan.open(self.smollm)

    def runs(self, seeds: list[int], known: Runs) -> Runs:
        """Train what is missing; the metrics of each method and seed that are known or that there
        was time for.

        Upgrades start from a trained SAE, which results do not hold: if one is missing, the method
        and all its upgrades are made again for that seed, so that they can be compared.
        """
        found: Runs = defaultdict(dict, {name: dict(runs) for name, runs in known.items()})
        for name, method in self.plan.methods.items():
            upgrades = [n for n, u in self.plan.upgrades.items() if u.teacher == name]
            parts = [name, *upgrades] + [f"{name}, tuned"] * bool(upgrades)
            missing = [seed for seed in seeds if any(str(seed) not in found[n] for n in parts)]
            if not missing:
                continue
            with suppress(OutOfTime):
                config_of = partial(method.config, self.source.d_in, scale=self.scale)
                factor = self.factor(method, config_of, known.get(name, {}))
                for seed in missing:
                    out, metrics = self.train(config_of(seed=seed, factor=factor))
                    made = {name: {"lr": factor, **metrics}}
                    for new in upgrades:
                        made[new], made[f"{name}, tuned"] = self.upgrade(new, out, seed)
                    for one, metrics in made.items():
                        found[one][str(seed)] = metrics
        return {name: runs for name, runs in found.items() if runs}

    def factor(
        self,
        method: Method,
        config_of: Callable[..., TrainConfig],
        known: dict[str, dict[str, Any]],
    ) -> float:
        """The factor of the learning rate of known runs, the method's own, or else the best one.

        From the default rate on, it is doubled, or else halved, as long as the error falls.
        """
        if known:
            return next(iter(known.values()))["lr"]
        if method.lr is not None:
            return method.lr

        def error(factor: float) -> float:
            config = config_of(seed=TUNING_SEED, factor=factor)
            return self.train(config, tuning=True)[1]["fvu"]

        best = 1.0
        for step in (2.0, 0.5):
            while error(step * best) < error(best):
                best *= step
        return best

    def train(self, config: TrainConfig, tuning: bool = False) -> tuple[Path, dict[str, Any]]:
        """The run directory of an SAE, which methods with equal settings share, and its metrics."""
        out = self.work / digest(config)
        return out, self.metrics(config, out, tuning=tuning)

    def upgrade(self, name: str, teacher: Path, seed: int) -> tuple[dict, dict]:
        """The metrics of a trained SAE after fine-tuning, as a rational one and unchanged.

        As `fastsae.upgrade.upgrade`, but the unchanged one is trained once for all upgrades.
        """
        plan, sae = self.plan.upgrades[name], load(teacher / "sae")
        config = plan.config(seed, self.scale)
        start, about = initial(sae, self.source, config)
        out = self.work / f"{teacher.name}-{digest(config)}"
        if plan.rate is not None:
            start, out = per_latent(start, plan.rate), out.with_name(f"{out.name}-{plan.rate:g}")
        rational = tuning(start, config), out, start
        own = replace(tuning(sae, config), activation=own_objective(sae, about["calibration_l0"]))
        unchanged = own, self.work / f"{teacher.name}-{digest(own)}", sae
        return self.metrics(*rational), self.metrics(*unchanged)

    def metrics(
        self, config: TrainConfig, out: Path, start: SAE | None = None, tuning: bool = False
    ) -> dict[str, Any]:
        """The metrics of the SAE in a run directory, of a tuning run the FVU alone.

        It is trained if they are missing, from another SAE if that is given.
        """
        file = out / ("tuning.json" if tuning else "study.json")
        if not file.exists():
            if time.monotonic() > self.until:
                raise OutOfTime
            if not (out / "sae").exists():
                resume = (out / "config.json").exists()
                Trainer(replace(config, out=out), self.source, start).fit(resume)
            args = load(out / "sae"), self.source, self.scale
            found = tuning_error(*args) if tuning else measure(*args, self.effect)
            print(f"{file}: {found}", flush=True)
            write_json(file, found | {"stamp": stamp()})
        return read_json(file)

    @cached_property
    def effect(self) -> CrossEntropy | None:
        """What measures the effect on a causal model's predictions, if the data is of one."""
        if not self.plan.causal:
            return None
        assert isinstance(heldout := self.source.heldout, ActivationShards)
        return CrossEntropy(heldout, self.scale.windows)


def known_runs(file: Path | None, scale: Scale) -> dict[str, Runs]:
    """The runs of every data set in a file of results; ValueError for others of another scale."""
    if file is None:
        return {}
    known = read_json(file)
    if known["scale"] != vars(scale):
        raise ValueError(f"{file} has runs of the scale {known['scale']}, not {vars(scale)}")
    return known["runs"]


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


def digest(config: TrainConfig | UpgradeConfig) -> str:
    """A short hash of all settings."""
    text = json.dumps(to_dict(config), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, out = parser.add_argument, RESULTS / "study"
    add("--work", type=Path, default=Path("runs/study"), help="where SAEs go (default: runs/study)")
    add("--smollm", type=Path, default=Path("smol"), help="SmolLM2's activations (default: smol)")
    add("--data", nargs="+", choices=DATA, default=list(DATA), help="data sets (default: all)")
    add("--seeds", nargs="+", type=int, default=SEEDS, help="training seeds (default: 0 to 4)")
    add("--known", type=Path, metavar="FILE", help="results.json whose runs are not made again, "
        "unless a missing upgrade starts from them (default: none)")  # fmt: skip
    add("--steps", type=int, default=Scale.steps, help="training steps (default: 300)")
    add("--minutes", type=float, default=math.inf, help="when to begin no more (default: never)")
    add("--out", type=Path, default=out, help="where results go (default: bench/results/study)")


def bench(arguments: argparse.Namespace) -> None:
    """Train and measure what is missing, then write and print the report."""
    until = time.monotonic() + 60 * arguments.minutes
    scale = Scale(arguments.steps, max(1, 3 * arguments.steps // 10))
    runs = known_runs(arguments.known, scale)
    for name in arguments.data:
        study = Study(name, arguments.smollm, arguments.work, scale, until)
        if found := study.runs(arguments.seeds, runs.get(name, {})):
            runs[name] = found
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out / "results.json", {"scale": vars(scale), "runs": runs})
    print(report(scale, runs, arguments.out))
    plot(runs, arguments.out / "claims.png")
