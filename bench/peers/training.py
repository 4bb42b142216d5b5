"""Trains each contender at its best learning rate.

It is the one of a grid at which the first seed has the lowest held-out error. So the first seed's
error is a little too low, for all contenders alike.
"""

import math
from collections.abc import Callable, Iterator
from statistics import mean
from typing import Any

from bench.clock import significant

from .process import run
from .task import Task, longest_warmup

Rates = tuple[float | None, ...]
"""Learning rates; None is a contender's own."""

GRID: Rates = (None, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3)

FVU, NEVER = "held-out FVU", "never active"
FEW = 0.02
"""A fraction of latents that may well be never active."""

Run = dict[str, Any]
Runs = dict[str, dict[str, list[Run]]]
"""By number of steps, then by contender: every run, with its learning rate and seed."""


def train(
    task: dict[str, Any],
    names: list[str],
    lengths: list[int],
    rates: Rates,
    seeds: int,
    known: Runs,
    about: dict[str, Any],
    keep: Callable[[Runs], None],
) -> None:
    """Make the runs that are not known yet or failed, and keep each."""
    for steps in lengths:
        for name in names:
            runs = known.setdefault(str(steps), {}).setdefault(name, [])
            for rate, seed in planned(runs, rates, seeds):
                before = [one for one in runs if (one["rate"], one["seed"]) == (rate, seed)]
                if any("error" not in one for one in before):
                    continue
                runs[:] = [one for one in runs if one not in before]
                own = {"steps": steps, "lr": rate, "seed": seed, "curve": curve(steps)}
                found = run(Task(contender=name, **own, **task))
                if "error" not in found:
                    seconds = sum(times := found.pop("ms")) / len(times) * steps / 1e3
                    found |= {"seconds": significant(seconds)}
                runs.append({"rate": rate, "seed": seed, **about, **found})
                print(f"training, {steps} steps, {name}: {runs[-1]}", flush=True)
                keep(known)


def check_warmups(known: Runs, where: str) -> None:
    """Raise ValueError if runs had longer warm-ups than runs have now: they are no comparison."""
    for steps, contenders in known.items():
        longest = longest_warmup(int(steps))
        for name, runs in contenders.items():
            for one in runs:
                if (given := one.get("warm-up", 0)) > longest:
                    raise ValueError(
                        f"{where} has runs of {name} with {given} steps of warm-up, but at most "
                        f"{longest} of {steps} are allowed now: remove these runs from the file"
                    )


def curve(steps: int) -> tuple[int, ...]:
    """Steps after which a run's quality is measured: half of it, a quarter, and so on."""
    return tuple(at for halvings in (4, 3, 2, 1) if (at := steps >> halvings))


def planned(runs: list[Run], rates: Rates, seeds: int) -> Iterator[tuple[float | None, int]]:
    """Learning rates and seeds; those after the grid follow from the runs of the grid."""
    yield from ((rate, 0) for rate in rates)
    if chosen := best(runs):
        yield from ((chosen[0]["rate"], seed) for seed in range(1, seeds))


def best(runs: list[Run]) -> list[Run]:
    """All seeds at the learning rate with the lowest error of the first seed."""
    tried = {one["rate"]: one[FVU] for one in runs if one["seed"] == 0 and finite(one)}
    if not tried:
        return []
    rate = min(tried, key=tried.__getitem__)
    return [one for one in runs if one["rate"] == rate and finite(one)]


def curve_of(runs: list[Run]) -> list[dict[str, float]]:
    """The points of the curve at the best learning rate, averaged over the seeds."""
    curves = [one["curve"] for one in best(runs) if "curve" in one]
    return [
        {key: mean(point[key] for point in points) for key in points[0]}
        for points in zip(*curves, strict=True)
    ]


def finite(run: Run) -> bool:
    return math.isfinite(run.get(FVU, math.nan))


def averaged(runs: list[Run]) -> dict[str, float]:
    """Mean over the seeds of what was measured at the best learning rate, and the FVU's spread; the
    lowest FVU of the first seed at which few latents are never active."""
    chosen = best(runs)
    found = {
        key: significant(mean(one[key] for one in chosen))
        for key in ("lr", FVU, NEVER, "L0")
        if all(key in one for one in chosen)
    }
    values = [one[FVU] for one in chosen]
    first = [one for one in runs if one["seed"] == 0 and finite(one)]
    alive = [one[FVU] for one in first if one.get(NEVER, math.nan) <= FEW]
    found |= {"lowest": min(values), "highest": max(values), "seeds": len(chosen)}
    return found | {"alive": min(alive, default=math.nan)}
