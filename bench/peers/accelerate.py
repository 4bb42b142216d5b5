"""Compares other libraries' training steps with the same steps after `fastsae.accelerate`.

Every class that it supports, at the start, in the middle and at the end of training: classes.py
says what these are. A round is four steps of the same SAE on the same batch: the library's, two
accelerated ones and the library's again, so that a steady drift of the machine cancels out. Its
ratio is of the time of all processor cores; above 1, the accelerated step is faster. Rounds are
added until the confidence interval of the median ratio is narrow, or there are too many: as the
number of rounds depends on the ratios, its 95% are nominal.

Results go to bench/results/accelerate-MAKER.json, by class, shape and phase.
Installation as for `python -m bench peers`.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
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

from .classes import PHASES, SUBJECTS, Phase

SHAPE = "1024,256,4096,32"

HALF_WIDTH = 0.015
"""Rounds are added until half the confidence interval is less than this fraction of the median, or
twice this fraction if all of the interval is far above 1."""

FAR = 1.1

FEWEST = 8
"""Rounds before the interval is looked at."""

TURN = ("library", "accelerated", "accelerated", "library")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--classes", nargs="+", help="which to measure, as in the results (default: all)")
    add("--phases", nargs="+", default=[*PHASES], help="which phases (default: all)")
    add("--shape", default=SHAPE, help=f"a letter, or tokens,d_in,d_sae,k (default: {SHAPE})")
    add("--rounds", type=int, default=100, help="most rounds of four steps (default: 100)")
    add("--active", nargs="+", type=float, metavar="X", help="print how the sparse ops do with "
        "this fraction of latents active, however many, instead")  # fmt: skip


def bench(arguments: argparse.Namespace) -> None:
    """Measure, record and print; ValueError for unknown names, and for more than one thread."""
    check_names("classes", arguments.classes, SUBJECTS)
    check_names("phases", arguments.phases, PHASES)
    if (
        threads := torch.get_num_threads()
    ) > 1:  # waiting threads take time of processor cores, too
        raise ValueError(f"accelerate needs OMP_NUM_THREADS=1, got {threads} threads")
    size, names = parse_shape(arguments.shape), arguments.classes or [*SUBJECTS]
    keep_freed_memory()
    phases = {name: PHASES[name] for name in arguments.phases}
    if arguments.active:
        dense.AboveThreshold.limits = lambda self, x: dense.Limits(1.0, 1.0)  # always sparse ops
        phases = {f"{active:.4f}": Phase(active, 0.0) for active in arguments.active}
    shown = {}
    for name in names:
        shown[name] = {}
        for phase, at in phases.items():
            found = record.attempt(partial(compare, name, size, at, arguments.rounds))
            shown[name][phase] = found
            print(f"{name}, {phase}: {json.dumps(found)}", flush=True)
            if not arguments.active:
                keep(name, size, {phase: found})
    print(table(shown))


def keep(name: str, size: Size, phases: dict[str, Any]) -> None:
    """Record phases of a class at a shape, each with its stamp. Its other phases keep the stamp
    that they were measured with."""
    stem, key = f"accelerate-{record.machine()}", key_of(name, size)
    path = record.RESULTS / f"{stem}.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    whole = stored.get(key, {"phases": {}})
    shared = {name: value for name, value in whole.items() if name != "phases"}
    kept = {phase: shared | found for phase, found in whole["phases"].items()}
    phases = {phase: record.stamp() | found for phase, found in phases.items()}
    record.write(stem, {key: {"phases": kept | phases}})


def key_of(name: str, size: Size) -> str:
    """What a class at a shape is called in the results."""
    tokens, d_in, d_sae, k = size
    return f"{name}: {tokens} tokens, {d_in} wide, {d_sae} latents, k {k}"


def batches(size: Size) -> list[Tensor]:
    """Gaussian tokens whose norms vary by a tenth, as those of activations do."""
    N, d_in, *_ = size
    generator = torch.Generator().manual_seed(0)
    norms = torch.randn(2, N, 1, generator=generator).mul_(0.1).exp_()
    return [*(norms * torch.randn(2, N, d_in, generator=generator))]


@contextmanager
def accelerated(sae: Any, remembered: dict[str, int]) -> Iterator[None]:
    """While active, the SAE is accelerated. It remembers, from one time to the next, how many
    batches it wants to take as dense ones: `fastsae.restore` forgets that."""
    fastsae.accelerate(sae)
    vars(sae).update(remembered)
    try:
        yield
    finally:
        remembered |= {name: n for name, n in vars(sae).items() if name in dense.COUNTERS}
        fastsae.restore(sae)


def compare(name: str, size: Size, phase: Phase, rounds: int) -> dict[str, Any]:
    """CPU milliseconds of both steps, and how many times faster the accelerated one is: the median
    over the rounds, its confidence interval, and the ratio of the sums of all rounds, which also
    counts what happens in few of them. Two rounds before are for warm-up.

    Both are steps of the same SAE: those of two differ by up to 2%, by where they lie in memory.
    """
    torch.manual_seed(0)
    subject, given = SUBJECTS[name](size), batches(size)
    subject.enter(phase, given[0])
    remembered: dict[str, int] = {}
    times: dict[str, list[float]] = {"library": [], "accelerated": []}
    ratios: list[float] = []
    for number in range(-2, rounds):
        took = dict.fromkeys(times, 0.0)
        for which in TURN:
            fast = accelerated(subject.sae, remembered) if which == "accelerated" else nullcontext()
            with fast:
                start = time.process_time()
                subject.run(phase, given[number % 2])
                took[which] += time.process_time() - start
        if number < 0:
            continue
        for which, seconds in took.items():
            times[which].append(seconds * 1e3 / 2)
        ratios.append(took["library"] / took["accelerated"])
        if len(ratios) >= FEWEST and narrow(*interval(ratios)):
            break
    found: dict[str, Any] = {which: {"cpu ms": summary(ms)} for which, ms in times.items()}
    low, high = interval(ratios)
    return found | {
        "ratio": round(median(ratios), 3),
        "of all time": round(sum(times["library"]) / sum(times["accelerated"]), 3),
        "95% interval": [round(low, 3), round(high, 3)],
        "rounds": len(ratios),
    }


def interval(values: list[float]) -> tuple[float, float]:
    """Order statistics between which the median of the distribution lies with a probability of at
    least 95%, whatever the distribution; the extremes of fewer than 6 values, with less."""
    ordered, n = sorted(values), len(values)
    outside, skipped = 0.5**n, 0
    while (more := outside + math.comb(n, skipped + 1) * 0.5**n) <= 0.025:
        outside, skipped = more, skipped + 1
    return ordered[skipped], ordered[n - 1 - skipped]


def narrow(low: float, high: float) -> bool:
    """Whether an interval needs no more rounds."""
    return (high - low) / (high + low) < HALF_WIDTH * (2 if low > FAR else 1)


def table(shown: dict[str, dict[str, Any]]) -> str:
    """A row per class: CPU milliseconds before and after, their ratio and its interval."""
    phases = [*next(iter(shown.values()))]
    rows = ([name, *map(cell, found.values())] for name, found in shown.items())
    return record.markdown(["", *phases], rows)


def cell(row: dict[str, Any]) -> str:
    if "error" in row:
        return row["error"]
    before, after = (row[which]["cpu ms"]["median"] for which in ("library", "accelerated"))
    low, high = row["95% interval"]
    return f"{before:.0f} → {after:.0f} ms ({row['ratio']:.2f}x, {low:.2f} to {high:.2f})"
