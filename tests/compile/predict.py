"""Predicts the fused training step on an H200, without a GPU, from bytes, FLOPs and occupancy.

    python tests/compile/predict.py [--json FILE]

Each kernel takes the longest of three times: its bytes of device memory at the speed of a copy, all
that it reads and writes at the speed of the L2, and the round trips to memory that its CTAs make one
after another, as many CTAs at a time as the compiled kernel leaves room for. These are predictions,
not measurements: the speed of a copy and of a bf16 GEMM were measured on an H200, the other rates
are assumptions. Run it, as table.py, in a process without TRITON_INTERPRET.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from cases import A, B, C, D
from table import measured, recorded

SHAPES = {"A": A, "B": B, "C": C, "D": D}
GOALS = {"A": (17.6, 16.0), "B": (2.75, None), "C": (1.85, None), "D": (63.0, 50.0)}
"""Milliseconds of the step in bf16, and with fp8 candidates."""

MEMORY, BF16 = 4.3e12, 780e12
"""Bytes per second of a copy and FLOP per second of a GEMM, as measured."""

L2, FP8, CACHED = 6.5e12, 1300e12, 30e6
"""Assumed: bytes per second of the L2, FLOP per second in fp8, and bytes of rows that stay in L2."""

ROUND_TRIP = 0.8e-6
"""Assumed seconds from a load to its use while memory is busy."""

SMALL = 40 * 3e-6
"""Assumed seconds of the step's small launches: sorting, biases, sums."""

SMS = 132
WINDOW = 8


class Work(NamedTuple):
    """What one kernel does in a step."""

    name: str
    case: str
    memory: float
    gathered: float
    """Bytes of rows that are in the L2 by the time they are read."""
    trips: float
    """Round trips to memory, of all programs together."""

    def seconds(self, ctas: int) -> float:
        waiting = self.trips * ROUND_TRIP / (SMS * ctas)
        return max(self.memory / MEMORY, (self.memory + self.gathered) / L2, waiting)


def busy_latents(N: int, F: int, K: int) -> float:
    """Latents that fire on some of N tokens where frequencies fall as 1 / rank."""
    members = F // K
    rank = torch.arange(1, members + 1, dtype=torch.float64)
    share = (1 + 1 / rank).log() / math.log(members + 1)
    return K * float((1 - (1 - share) ** N).sum())


def cached_share(D: int, F: int, K: int) -> float:
    """Share of the picked rows that are among the most frequent ones, which stay in the L2."""
    rank = min(CACHED / (2 * D * K), F // K)
    return math.log(rank + 1) / math.log(F // K + 1)


def candidate_work(N: int, D: int, F: int, K: int) -> Iterator[Work]:
    """Ranking 2 K candidates of a product in fp8 by their values in bf16."""
    picked, share = 2 * N * 2 * K * D, cached_share(D, F, K)
    yield Work("quantize rows", "quantize", 3 * N * D, 0, N)
    yield Work("rescore", "rescore", picked * (1 - share), picked * share, 3 * N)


def step_work(N: int, D: int, F: int, K: int, fp8: bool) -> Iterator[Work]:
    """The step in bf16, with moments in bf16 and rows that wait up to WINDOW steps."""
    busy, share = busy_latents(N, F, K), cached_share(D, F, K)
    visited = busy + (F - busy) / WINDOW
    picked = 2 * N * K * D  # bytes of bf16 rows, as often as they are picked
    yield Work("center", "center", 6 * N * D, 0, N)
    yield Work("topk", "topk", 2 * N * F, 0, 3 * N)
    if fp8:
        yield from candidate_work(N, D, F, K)
    rows = max(picked * (1 - share), 2 * busy * D)
    yield Work("squared_error", "squared_error", rows + 6 * N * D, picked - rows, 3 * N)
    state = (18 + fp8 / 2) * visited * D  # weight, moments, shadows: half of those of both matrices
    gathers = visited * (2 + N * K / busy / 4)  # rows of x or of the error come by fours
    yield Work("adam", "adam window", 2 * (state + 2 * N * D), 2 * picked, 2 * gathers)


def predict(shape: str, table: list[dict], fp8: bool) -> dict[str, float]:
    """Milliseconds of each part of the step."""
    N, D, F, K = SHAPES[shape]
    found = {"encoder GEMM": 2 * N * F * D / (FP8 if fp8 else BF16) * 1e3}
    for work in step_work(N, D, F, K, fp8):
        ctas = [row["ctas"] for row in table if row["case"].startswith(work.case) and row["real"]]
        found[work.name] = work.seconds(min(ctas)) * 1e3
    found["small launches"] = SMALL * 1e3
    return found | {"step": sum(found.values())}
