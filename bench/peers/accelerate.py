"""Compares other libraries' training steps with the same steps after `fastsae.accelerate`.

Every class that it supports, at the start, in the middle and at the end of training: classes.py
says what these are. Both steps take turns on the same batches. Ratios are of wall time and of the
time of all processor cores; above 1, the accelerated one is faster.

Results go to bench/results/accelerate-amd.json or accelerate-intel.json, by class and phase.
Installation as for `python -m bench peers`.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

import fastsae
from bench import record
from bench.clock import summary
from bench.problem import Size, check_names, parse_shape
from fastsae.dropin import dense
from fastsae.memory import keep_freed_memory

from .classes import PHASES, SUBJECTS, Phase, Subject

SHAPE = "1024,256,4096,32"

SIZE = "tokens, d_in, d_sae, k"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--classes", nargs="+", help="which to measure, as in the results (default: all)")
    add("--phases", nargs="+", default=[*PHASES], help="which phases (default: all)")
    add("--shape", default=SHAPE, help=f"a letter, or tokens,d_in,d_sae,k (default: {SHAPE})")
    add("--rounds", type=int, default=5, help="rounds of timed steps (default: 5)")
    add("--active", nargs="+", type=float, metavar="X", help="print how the sparse ops do with "
        "this fraction of latents active, however many, instead")  # fmt: skip


def bench(arguments: argparse.Namespace) -> None:
    """Measure, record and print; ValueError for unknown names."""
    check_names("classes", arguments.classes, SUBJECTS)
    check_names("phases", arguments.phases, PHASES)
    size, names = parse_shape(arguments.shape), arguments.classes or [*SUBJECTS]
    keep_freed_memory()
    phases = {name: PHASES[name] for name in arguments.phases}
    if arguments.active:
        dense.MAX_ACTIVE = dense.WIDEST = 1.0  # so that the sparse ops run
        phases = {f"{active:.4f}": Phase(active, 0.0) for active in arguments.active}
    shown = {}
    for name in names:
        shown[name] = {
            phase: record.attempt(partial(compare, name, size, at, arguments.rounds))
            for phase, at in phases.items()
        }
        print(f"{name}: {json.dumps(shown[name])}", flush=True)
        if not arguments.active:
            keep(name, size, shown[name])
    print(table(shown))


def keep(name: str, size: Size, phases: dict[str, Any]) -> None:
    """Record phases of a class; its other phases stay, if they were measured at this size."""
    stem, about = f"accelerate-{record.machine()}", {SIZE: list(size)}
    path = record.RESULTS / f"{stem}.json"
    known = json.loads(path.read_text()).get(name, {}) if path.exists() else {}
    stored = known["phases"] if known.get(SIZE) == list(size) else {}
    record.write(stem, {name: about | {"phases": stored | phases}})


def batches(size: Size) -> list[Tensor]:
    """Gaussian tokens whose norms vary by a tenth, as those of activations do."""
    N, d_in, *_ = size
    generator = torch.Generator().manual_seed(0)
    norms = torch.randn(2, N, 1, generator=generator).mul_(0.1).exp_()
    return [*(norms * torch.randn(2, N, d_in, generator=generator))]


def compare(name: str, size: Size, phase: Phase, rounds: int) -> dict[str, Any]:
    """Times of both steps, after one of each for warm-up, and the mean L0 of the SAE."""
    subjects: dict[str, Subject] = {}
    for which in ("library", "accelerated"):
        torch.manual_seed(0)
        subjects[which] = SUBJECTS[name](size)
    given = batches(size)
    for subject in subjects.values():
        subject.enter(phase, given[0])
    fastsae.accelerate(subjects["accelerated"].sae)
    wall: dict[str, list[float]] = {which: [] for which in subjects}
    cores: dict[str, list[float]] = {which: [] for which in subjects}
    for number in range(rounds + 1):
        for which, subject in subjects.items():
            start = time.perf_counter(), time.process_time()
            subject.run(phase, given[number % 2])
            wall[which].append((time.perf_counter() - start[0]) * 1e3)
            cores[which].append((time.process_time() - start[1]) * 1e3)
    found = {which: {"ms": summary(times[1:])} for which, times in wall.items()}
    ratios = {"wall": ratio(wall, median), "cpu": ratio(cores, min)}
    return found | ratios | {"rounds": rounds}


def ratio(times: dict[str, list[float]], of: Callable[[list[float]], float]) -> float:
    """How many times faster the accelerated step is. For CPU time, the least of the rounds is
    compared, which other programs on the machine change least."""
    return round(of(times["library"][1:]) / of(times["accelerated"][1:]), 3)


def table(shown: dict[str, dict[str, Any]]) -> str:
    """A row per class: milliseconds before and after, and the ratios of wall and CPU time."""
    phases = [*next(iter(shown.values()))]
    rows = ([name, *map(cell, found.values())] for name, found in shown.items())
    return record.markdown(["", *phases], rows)


def cell(row: dict[str, Any]) -> str:
    if "error" in row:
        return row["error"]
    before, after = (row[which]["ms"]["median"] for which in ("library", "accelerated"))
    return f"{before:.0f} → {after:.0f} ms ({row['wall']:.2f}x, CPU {row['cpu']:.2f}x)"
