"""Starts every contender when its turn comes, and keeps what they say."""

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from bench import record
from bench.clock import digits, summary
from bench.problem import SHAPES, Size, check_names
from fastsae.data import ActivationShards, demo_shards
from fastsae.device import choose_device
from fastsae.train.optim import default_lr

from .contender import CONTENDERS, KNOWN, SAME_LR, VARIANTS
from .report import plot, tables
from .task import Task

TURN = 2.0
"""Seconds for which steps are timed in a turn; a step that takes longer is timed once."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--shapes", nargs="+", help="of a to d, on a GPU A to D (all)")
    add("--rounds", type=int, default=3, help="of timed steps (3; 0 for none)")
    add("--steps", type=int, default=300, help="of training (300; 0 for none)")
    add("--contenders", nargs="+", help="by their names in the results (all)")
    add("--data", type=Path, help="a folder of activations (the demo's)")
    add("--variants", action="store_true", help="race fastsae's own settings instead")


def bench(arguments: argparse.Namespace) -> None:
    """Race at every size, then over steps of training, of size a but as wide as the data.

    Leaves peers-amd.json, peers-intel.json or peers-cuda.json in bench/results (of variants,
    variants-...), beside what is there of other sizes, and with matplotlib a plot; prints tables.
    ValueError for a contender that there is not, for nothing to do, for a run too short to be
    timed, and for data without a held-out part.
    """
    rounds, steps = arguments.rounds, arguments.steps
    if rounds < 0 or not (rounds or steps):
        raise ValueError(f"rounds or steps must be above 0, got {rounds} and {steps}")
    if steps and steps < 3:
        raise ValueError(f"steps must be at least 3, or 0 for no training runs, got {steps}")
    kind, table = ("variants", VARIANTS) if arguments.variants else ("peers", CONTENDERS)
    check_names("contenders", arguments.contenders, table)
    shapes = chosen(arguments.shapes)
    shards = training_data(arguments.data) if steps else None
    ready, about = installed(arguments.contenders or list(table))
    device = choose_device("auto")
    path = record.RESULTS / f"{kind}-{record.machine(device)}.json"

    def keep(name: str, task: dict[str, Any], contenders: dict[str, Any]) -> None:
        record.write(path.stem, {name: {**task, **about, "contenders": contenders}}, device)

    for name, size in shapes.items() if rounds else ():
        task = {**sized(size), "device": device, "seconds": TURN}
        keep(name, task, race(name, task, ready, rounds))
    if shards is not None:
        task = {**sized(SHAPES["a"]), "d_in": shards.d_in, "device": device, "steps": steps}
        found = training({**task, "data": str(shards.path)}, ready)
        keep("training", {**task, "data": shards.fingerprint}, found)
    results = json.loads(path.read_text())
    if find_spec("matplotlib") is not None:
        plot(results, path.with_suffix(".png"))
    print(tables(results))


def chosen(names: list[str] | None) -> dict[str, Size]:
    """Those of this machine's sizes that have these names, by default all."""
    here = list("ABCD" if choose_device("auto") == "cuda" else "abcd")
    check_names("shapes here", names, here)
    return {name: SHAPES[name] for name in names or here}


def sized(size: Size) -> dict[str, Any]:
    """The part of a task that its size is."""
    return dict(zip(("tokens", "d_in", "d_sae", "k"), size, strict=True))


def training_data(folder: Path | None) -> ActivationShards:
    """The activations in a folder, or the demo's."""
    shards = ActivationShards(folder) if folder else demo_shards()
    if shards.heldout is None:
        raise ValueError(f"{shards.path} must have a held-out part to measure on, in heldout/")
    return shards


def installed(names: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Those contenders that can run here; and the versions of their libraries, and which lack."""
    packages = {name: one.package for name in names if (one := KNOWN[name]).package}
    versions = {d.name: d.version for d in distributions() if d.name in packages.values()}
    missing = {n: f"{package} is not installed" for n, package in packages.items()
               if package not in versions}  # fmt: skip
    for name, why in missing.items():
        print(f"{name} is missing: {why}", flush=True)
    return [n for n in names if n not in missing], {"versions": versions, "missing": missing}


def race(shape: str, task: dict[str, Any], names: list[str], rounds: int) -> dict[str, Any]:
    """Times of a step and the most memory of each contender, or why it has none."""
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names:
            if any("error" in turn for turn in turns[name]):
                continue
            found = run(Task(contender=name, **task))
            turns[name].append(found)
            shown = found.get("error") or f"{median(found['ms']):.1f} ms"
            print(f"{shape}, round {number + 1} of {rounds}, {name}: {shown}", flush=True)
    return {name: of_turns(found, task["tokens"]) for name, found in turns.items()}


def of_turns(turns: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """What a contender's turns come to: of each, the median counts."""
    if "error" in turns[-1]:
        return turns[-1]
    ms = summary([median(turn["ms"]) for turn in turns])
    peak = max(turn["peak MB"] for turn in turns)
    return {"ms": ms, "tokens/s": round(tokens / ms["median"] * 1e3), "peak MB": round(peak)}


def training(task: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Every contender's run with its own learning rate, and where it means the same, fastsae's."""
    lr = default_lr(task["d_sae"], task["steps"])
    results, runs = {}, {}
    for name in (name for name in names if not KNOWN[name].accelerated):  # the same mathematics
        runs[name] = Task(contender=name, **task)
        if KNOWN[name].package and KNOWN[name].adam:
            runs[name + SAME_LR] = Task(contender=name, lr=lr, **task)
    for name, one in runs.items():
        found = run(one)
        if "error" not in found:
            times = found.pop("ms")
            each = sum(times) / len(times) / 1e3
            found |= {"tokens/s": round(one.tokens / each), "seconds": digits(one.steps * each)}
        results[name] = found
        print(f"training, {name}: {found}", flush=True)
    return results


def run(task: Task) -> dict[str, Any]:
    """What a contender's process says, or the error that it ended with."""
    command = [sys.executable, "-m", "bench.peers.contender", json.dumps(asdict(task))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout)
    if done.returncode < 0:
        return {"error": f"killed by signal {-done.returncode}"}
    lines = done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"]
    error = next((line for line in reversed(lines) if "Error" in line), lines[-1])[:300]
    hint = " (try: pip uninstall torchvision)" if "torchvision" in done.stderr else ""
    return {"error": error + hint}
