"""Predicts the fused training step on an H200, without a GPU, from bytes, FLOPs and occupancy.

    python tests/compile/predict.py [--table FILE]

Each kernel takes the longest of three times: its bytes of device memory at the speed of a copy, all
that it reads and writes at the speed of the L2, and the round trips to memory that its CTAs make
one after another, as many CTAs at a time as the compiled kernel leaves room for. These are
predictions, not measurements: the speed of a copy and of a bf16 GEMM were measured on an H200, the
other rates are assumptions. Run it, as table.py, in a process without TRITON_INTERPRET.
"""

import argparse
import json
import math
from collections.abc import Iterable, Iterator
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
"""Assumed: bytes per second of the L2, FLOP per second in fp8, and bytes of rows that L2 keeps."""

ROUND_TRIP = 0.8e-6
"""Assumed seconds from a load to its use while memory is busy."""

SMALL = 40 * 3e-6
"""Assumed seconds of the step's small launches: sorting, biases, sums."""

SMS = 132
WINDOW = 8


class Work(NamedTuple):
    """What one kernel does in a step."""

    kernel: str
    memory: float
    """Bytes of device memory that it reads and writes."""
    cached: float
    """Bytes that it reads of rows that are in the L2 by then."""
    trips: float
    """Round trips to memory, of all programs together."""

    def seconds(self, ctas: int) -> float:
        waiting = self.trips * ROUND_TRIP / (SMS * ctas)
        return max(self.memory / MEMORY, (self.memory + self.cached) / L2, waiting)


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


def step_work(N: int, D: int, F: int, K: int, fp8: bool) -> Iterator[Work]:
    """The step in bf16, with moments in bf16 and rows that wait up to WINDOW steps."""
    busy, share = busy_latents(N, F, K), cached_share(D, F, K)
    visited = busy + (F - busy) / WINDOW
    picked = 2 * N * K * D  # bytes of bf16 rows, as often as they are picked
    yield Work("_center_kernel", 6 * N * D, 0, N)
    yield Work("_topk_kernel", 2 * N * F, 0, 3 * N)
    if fp8:
        yield Work("_quantize_kernel", 3 * N * D, 0, N)
        yield Work("_rescore_kernel", 2 * picked * (1 - share), 2 * picked * share, 6 * N)
    rows = max(picked * (1 - share), 2 * busy * D)
    yield Work("_squared_error_kernel", rows + 6 * N * D, picked - rows, 3 * N)
    state = (18 + fp8 / 2) * visited * D  # per weight: itself, both moments, the shadows
    together = 8 if D <= 2048 else 4  # rows of x or of the error that a program waits for
    gathers = visited * (2 + N * K / busy / together)
    yield Work("_adam_kernel", 2 * (state + 2 * N * D), 2 * picked, 2 * gathers)


def resident(table: list[dict], kernel: str, shape: str) -> int:
    """CTAs per SM of the compiled kernel; of equal launches, the table has the first shape's."""
    rows = [row for row in table if row["kernel"] == kernel and row["shape"].endswith(" bf16")]
    window = [row for row in rows if "window" in row["case"]] or rows
    same = [row for row in window if row["shape"][0] == shape] or window
    return min(row["ctas"] for row in same)


def predict(table: list[dict], shape: str, fp8: bool) -> dict[str, float]:
    """Milliseconds of each part of the step."""
    N, D, F, K = SHAPES[shape]
    found: dict[str, float] = {"encoder GEMM": 2e3 * N * F * D / (FP8 if fp8 else BF16)}
    for work in step_work(N, D, F, K, fp8):
        found[work.kernel] = work.seconds(resident(table, work.kernel, shape)) * 1e3
    found["small launches"] = SMALL * 1e3
    return found | {"step": sum(found.values())}


def line(name: str, cells: Iterable[object]) -> str:
    return f"{name:24}" + "".join(f"{cell:>8}" for cell in cells)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Predict the fused step on an H200")
    parser.add_argument("--table", type=Path, help="what table.py --json wrote, to compile nothing")
    given = parser.parse_args().table
    rows = json.loads(given.read_text()) if given else measured(recorded())
    rows = [row for row in rows if row["arch"] == 90 and row["real"]]
    for fp8 in (False, True):
        print("fp8 candidates" if fp8 else "bf16", "(predicted milliseconds on an H200)")
        print(line("", SHAPES))
        parts = {shape: predict(rows, shape, fp8) for shape in SHAPES}
        for name in parts["A"]:
            print(line(name, (f"{parts[shape][name]:.2f}" for shape in SHAPES)))
        print(line("goal", (GOALS[shape][fp8] or "-" for shape in SHAPES)))
