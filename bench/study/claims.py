"""The papers' claims as differences between two methods, with what the seeds say about each.

Two methods share seeds, data and batch order. A difference is the mean over seeds of the relative
difference (of fractions, of the difference itself), with a 95 % t interval:

    equivalent    the interval lies within 1 % on either side of 0
    better, worse it lies on one side of 0, and not within 1 %
    undecided     else
"""

import math
from statistics import mean, stdev
from typing import Any, NamedTuple

from . import plan
from .plan import PATHS, PER_LATENT, ROOM, TEACHERS, VARIATIONAL, at

Runs = dict[str, dict[str, dict[str, Any]]]
"""Results of one data set, by method and seed."""

SMALLEST = 0.01
"""The smallest effect of interest."""
L0_TOLERANCE = 0.02
"""Relative difference up to which two methods' L0 count as equal."""
T95 = 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262
"""97.5 % quantiles of Student's t for 2, 3, ... values; for more than these, the last."""
HIGHER = {"pcr", "components", "utilization", "ce recovered", "recovery"}
"""Metrics of which more is better."""
FRACTIONS = {"dead", "utilization", "ce recovered", "recovery", "pursuit gap"}
"""Metrics that are compared by their difference."""


class Claim(NamedTuple):
    """That `method` is better, or worse, than `other` in a metric, as a paper says or we ask."""

    paper: str
    says: str
    method: str
    other: str
    metric: str = "fvu"


class Difference(NamedTuple):
    """What the seeds say about a claim on one data set."""

    ours: float
    theirs: float
    center: float
    half: float
    """Half the width of the interval; infinite for one seed."""
    verdict: str


ABS, RT = "AbsTopK, arXiv:2510.00404", "RT-TopKSAE (rotation trick, arXiv:2410.06424)"
RSAE, VSAE = "RSAE, arXiv:2606.14990", "vSAE, arXiv:2509.22994"
EACH = "RSAE with a function per latent (our experiment)"

CELLS = [at(*cell) for cell in (plan.USUAL, *plan.MAP, plan.WIDE, plan.TENTH, plan.EIGHT)]
"""k and expansions at which AbsTopK and TopK are compared; THIRD is one of MAP."""

CLAIMS = [
    *(Claim(ABS, "better", f"AbsTopK, {cell}", f"TopK, {cell}", metric)
      for metric in ("fvu", "ce recovered", "recovery", "pursuit gap") for cell in CELLS),
    *(Claim(ABS, "better", f"BatchAbsTopK, {cell}", f"BatchTopK, {cell}")
      for cell in (at(*cell) for cell in plan.BATCHWISE)),
    *(Claim(RT, "better", f"{name}, untied, {label}", f"{other}, untied, {label}", metric)
      for name in ("RT dense", "RT support") for other in ("TopK", "TopK with aux-k")
      for metric in ("dead", "utilization", "pcr", "components", "fvu") for label in ROOM),
    *(Claim(RSAE, "better", f"{path} {teacher}", other, metric)
      for metric in ("fvu", "ce recovered") for teacher in TEACHERS for path in PATHS
      for other in (f"{teacher}, tuned", f"scale and shift of {teacher}")),
    *(Claim(EACH, "better", f"{path} {t}", f"{path.partition(' per latent')[0]} of {t}")
      for t in TEACHERS for path in PER_LATENT),
    *(Claim(VSAE, "worse", name, "TopK, aux-k" if ", aux-k" in name else "TopK, no aux-k", metric)
      for metric in ("fvu", "dead") for name in VARIATIONAL if name.startswith("vSAE")),
    Claim("fastsae", "better", "TopK, log_fvu", "TopK, fvu"),
]  # fmt: skip


def difference(claim: Claim, runs: Runs) -> Difference | None:
    """The difference of two methods on one data set; None if either was not measured."""
    own, other = runs.get(claim.method, {}), runs.get(claim.other, {})
    shared = own.keys() & other.keys() if own is not other else set()
    seeds = [s for s in sorted(shared) if claim.metric in own[s].keys() & other[s].keys()]
    if not seeds:
        return None
    ours, theirs = ([run[seed][claim.metric] for seed in seeds] for run in (own, other))
    units = [1.0] * len(seeds) if claim.metric in FRACTIONS else theirs
    changes = [(a - b) / unit for a, b, unit in zip(ours, theirs, units, strict=True)]
    center, half = mean(changes), interval(changes)
    verdict = judge(center, half, claim.metric in HIGHER)
    l0, their_l0 = (mean(run[seed]["l0"] for seed in seeds) for run in (own, other))
    in_spite = "better" if l0 < their_l0 else "worse"  # of fewer, or more, active latents
    if abs(l0 / their_l0 - 1) > L0_TOLERANCE and verdict != in_spite:
        verdict = f"not comparable: L0 {l0:.1f} against {their_l0:.1f}"
    return Difference(mean(ours), mean(theirs), center, half, verdict)


def interval(changes: list[float]) -> float:
    """Half the width of the 95 % t interval of their mean."""
    n = len(changes)
    return T95[min(n - 2, len(T95) - 1)] * stdev(changes) / n**0.5 if n > 1 else math.inf


def judge(center: float, half: float, higher: bool) -> str:
    low, high = center - half, center + half
    if max(-low, high) <= SMALLEST:
        return "equivalent"
    if low <= 0 <= high:
        return "undecided"
    return "better" if (center > 0) == higher else "worse"
