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
from collections.abc import Iterable
from pathlib import Path

from cases import A, B, C, D
from table import measured, recorded

from fastsae.estimate.gpu_step import H200, SMALL, step_work

SHAPES = {"A": A, "B": B, "C": C, "D": D}
GOALS = {"A": (17.6, 16.0), "B": (2.75, None), "C": (1.85, None), "D": (63.0, 50.0)}
"""Milliseconds of the step in bf16, and with fp8 candidates."""

ROUND_TRIP = 0.8e-6
"""Assumed seconds from a load to its use while memory is busy."""

SMS = 132


def resident(table: list[dict], kernel: str, shape: str) -> int:
    """CTAs per SM of the compiled kernel; of equal launches, the table has the first shape's."""
    rows = [row for row in table if row["kernel"] == kernel and row["shape"].endswith(" bf16")]
    window = [row for row in rows if "window" in row["case"]] or rows
    same = [row for row in window if row["shape"][0] == shape] or window
    return min(row["ctas"] for row in same)


def predict(table: list[dict], shape: str, fp8: bool) -> dict[str, float]:
    """Milliseconds of each part of the step."""
    N, D, F, K = SHAPES[shape]
    found: dict[str, float] = {"encoder GEMM": 2e3 * N * F * D / (H200.fp8 if fp8 else H200.bf16)}
    for work in step_work(N, D, F, K, fp8):
        waiting = work.trips * ROUND_TRIP / (SMS * resident(table, work.kernel, shape))
        found[work.kernel] = work.seconds(H200, waiting) * 1e3
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
