"""Compares step time and held-out error with other SAE trainers.

Each contender trains with its library's own loop, on the same batches in the same order, in its own
process, so that at most one model is in memory. Steps are timed in rounds, in which all contenders
take turns, also at the size of the training runs, whose seconds these times give. Each contender
trains for the same numbers of tokens, at the best of six learning rates (five and its own), with
several seeds, which gives its held-out FVU; during a run, it is measured on 16,384 held-out tokens.
Warm-ups are each library's own, but at most 1/20 of the run; results have the warm-up of every run.
Other settings are each library's own. An accelerated contender trains the same SAE as its library,
up to rounding: its runs stand for the library's where it has none.

Results go to bench/results/peers-intel.json, or that of another machine (variants-... with
--variants), which keeps results of other shapes and data, and, if matplotlib is installed, to
plots. Every training run is saved at once: the same command continues an interrupted one. One
environment for all:

    pip install -c constraints.txt -e '.[demo,peers]' && pip uninstall torchvision

The second command is for CPU builds of torch, with which the torchvision that one of the libraries
installs breaks the import of transformers.
"""

import argparse
import json
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench import record
from bench.clock import summary
from bench.problem import SHAPES, Size, check_names
from fastsae.data import ActivationShards, demo_shards
from fastsae.device import choose_device
from fastsae.environment import source_commit

from .contender import CONTENDERS, KNOWN, VARIANTS
from .process import run
from .report import TRAINING, plot, tables
from .task import Task
from .training import GRID, check_warmups, train

TURN = 2.0
"""Seconds of steps per turn; a step that takes longer is timed once."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--shapes", nargs="*", help="shapes to time, a-d, on a GPU A-D; no value: none (default: "
        "all)")  # fmt: skip
    add("--rounds", type=int, default=3, help="rounds of timed steps, 0 for none (default: 3)")
    add("--steps", nargs="+", type=int, default=[300, 2000], metavar="N", help="lengths of "
        "training runs, 0 for none (default: 300 2000)")  # fmt: skip
    add("--tokens", type=int, metavar="N", help="tokens per step of training runs (default: "
        "4096)")  # fmt: skip
    add("--latents", type=int, metavar="N", help="latents of training runs (default: 4096)")
    add("--rates", nargs="+", type=float, metavar="X", help="learning rates to choose from, 0 for "
        "each contender's own (default: that and a grid of five; with --variants: 0)")  # fmt: skip
    add("--seeds", type=int, default=3, help="seeds of the training runs (default: 3)")
    add("--contenders", nargs="+", help="names of contenders, as in the results (default: all)")
    add("--data", type=Path, help="directory of activations (default: 2 million of MiniLM)")
    add("--variants", action="store_true", help="compare settings of fastsae instead")


@record.alone()
def bench(arguments: argparse.Namespace) -> None:
    """Time steps at every shape, then train at shape a with the data's width; print tables.

    Raises ValueError for unknown contenders, nothing to do, runs too short to be timed, data
    without a held-out part, stored runs with warm-ups longer than runs have now, and if another
    race holds the results' folder.
    """
    rounds, lengths = arguments.rounds, [n for n in arguments.steps if n]
    if rounds < 0 or not (rounds or lengths):
        raise ValueError(f"rounds or steps must be above 0, got {rounds} and {arguments.steps}")
    if any(steps < 3 for steps in lengths):
        raise ValueError(f"steps must be at least 3, or 0 for no training, got {arguments.steps}")
    for name in ("tokens", "latents"):
        if (given := getattr(arguments, name)) is not None and given < 1:
            raise ValueError(f"{name} must be at least 1, got {given}")
    if arguments.seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {arguments.seeds}")
    kind, table = ("variants", VARIANTS) if arguments.variants else ("peers", CONTENDERS)
    check_names("contenders", arguments.contenders, table)
    shapes = chosen(arguments.shapes)
    shards = training_data(arguments.data) if lengths else None
    ready, about = installed(arguments.contenders or list(table))
    device = choose_device("auto")
    path = record.RESULTS / f"{kind}-{record.machine(device)}.json"

    def keep(name: str, task: dict[str, Any], found: dict[str, Any]) -> None:
        record.write(path.stem, {name: {**task, **about, **found}}, device)

    for name, size in shapes.items() if rounds else ():
        task = {**sized(size), "device": device, "seconds": TURN}
        keep(name, task, {"contenders": race(name, task, ready, rounds)})
    if shards is not None:
        label = f", {arguments.data.name}" * bool(arguments.data)
        label += f", {arguments.tokens} per step" * bool(arguments.tokens)
        label += f", {arguments.latents} latents" * bool(arguments.latents)
        name = f"{TRAINING}{label}, {shards.fingerprint}"
        task = {**sized(SHAPES["a"]), "d_in": shards.d_in, "device": device}
        given = {"tokens": arguments.tokens, "d_sae": arguments.latents}
        task |= {name: size for name, size in given.items() if size}
        stored = json.loads(path.read_text()).get(name, {}) if path.exists() else {}
        known = {part: stored.get(part, {}) for part in ("contenders", "runs")}
        check_warmups(known["runs"], f"{name!r} in {path}")
        if rounds:
            timed = race(name, {**task, "seconds": TURN}, ready, rounds)
            known["contenders"] |= timed
            keep(name, task, known)
        rates = arguments.rates or ([0.0] if arguments.variants else GRID)
        # An accelerated contender would train the same SAE again: it must be asked for.
        asked = arguments.contenders or [n for n in ready if "accelerate" not in KNOWN[n].options]
        train(
            {**task, "data": str(shards.path)},
            [n for n in ready if n in asked],
            lengths,
            tuple(rate or None for rate in rates),
            arguments.seeds,
            known["runs"],
            {"commit": source_commit(), "versions": about["versions"]},
            lambda runs: keep(name, task, known | {"runs": runs}),
        )
    results = json.loads(path.read_text())
    print(tables(results))
    if find_spec("matplotlib") is not None:
        plot(results, path)


def chosen(names: list[str] | None) -> dict[str, Size]:
    """This machine's shapes with these names, by default all of them."""
    here = list("ABCD" if choose_device("auto") == "cuda" else "abcd")
    check_names("shapes for this machine", names, here)
    return {name: SHAPES[name] for name in (here if names is None else names)}


def sized(size: Size) -> dict[str, Any]:
    """A shape as fields of a task."""
    return dict(zip(("tokens", "d_in", "d_sae", "k"), size, strict=True))


def training_data(folder: Path | None) -> ActivationShards:
    """The activations in a directory, or as many of the demo's as the standard library yields."""
    shards = ActivationShards(folder) if folder else demo_shards(max_tokens=2_000_000)
    if shards.heldout is None:
        raise ValueError(f"{shards.path} must have a held-out part to measure on, in heldout/")
    return shards


def installed(names: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Contenders that can run here; versions of their libraries, and which are missing and why."""
    packages = {name: one.package for name in names if (one := KNOWN[name]).package}
    versions = {d.name: d.version for d in distributions() if d.name in packages.values()}
    missing = {n: f"{package} is not installed" for n, package in packages.items()
               if package not in versions}  # fmt: skip
    for name, why in missing.items():
        print(f"skipping {name}: {why}", flush=True)
    return [n for n in names if n not in missing], {"versions": versions, "missing": missing}


def race(shape: str, task: dict[str, Any], names: list[str], rounds: int) -> dict[str, Any]:
    """Step time and peak memory of each contender, or its error."""
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names:
            if any("error" in turn for turn in turns[name]):
                continue
            found = run(Task(contender=name, **task))
            turns[name].append(found)
            shown = found.get("error") or f"{median(found['ms']):.1f} ms"
            print(f"{shape}, round {number + 1} of {rounds}, {name}: {shown}", flush=True)
    threads = {"threads": torch.get_num_threads()}  # training runs may have another number
    return {name: of_turns(found, task["tokens"]) | threads for name, found in turns.items()}


def of_turns(turns: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """Summary of a contender's turns, by the median step of each."""
    if "error" in turns[-1]:
        return turns[-1]
    ms = summary([median(turn["ms"]) for turn in turns])
    peak = max(turn["peak MB"] for turn in turns)
    return {"ms": ms, "tokens/s": round(tokens / ms["median"] * 1e3), "peak MB": round(peak)}
