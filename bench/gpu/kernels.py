"""The kernel table: each op at each shape, against its floor and against plain PyTorch."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from fastsae_kernels import _encode_kernel, encode_topk
from fastsae_kernels._encode_kernel import Tiles, tiles_for

from .checks import poisoned
from .checks_encode import encoder_dtype, exact_check
from .clock import Floors, attempt, floors_from, free, input_sets, measure
from .data import Problem
from .op import Op
from .ops import GEMM, OPS, encode_inputs, encoding
from .record import Record

GOAL = 1.15
"""Multiple of the bare product that the encoder may take."""


def op_row(op: Op, p: Problem, floors: Floors) -> dict[str, Any]:
    """Time, floor and fraction of it; the same op by other means."""
    torch.manual_seed(0)
    sets = input_sets(op.make, p)
    cost = op.cost(p, *sets[0])
    row: dict[str, Any] = {"bytes": cost.bytes, "flops": cost.flops}
    others = {name: way for name, way in op.others.items() if p.name in way.shapes}
    with op.around():
        row["ms"] = measure(op.run, sets, p)
        same = {name: way.run for name, way in others.items() if way.make is None}
        found = {name: timed_other(run, sets, p) for name, run in same.items()}
        del sets
        free()
        for name, way in others.items():
            if way.make is not None:
                found[name] = attempt(partial(made_other, way.run, way.make, p))
    ms, floor = row["ms"]["median"], floors.ms(cost)
    row |= {"floor ms": round(floor, 4), "of floor": round(floor / ms, 3), "others": found}
    if cost.gathered:
        row["gathered, of copy"] = round(cost.gathered / floors.bandwidth * 1e3 / ms, 3)
    return row


def timed_other(run: Callable[..., object], sets: list[tuple], p: Problem) -> dict[str, Any]:
    return attempt(lambda: {"ms": measure(run, sets, p, budget=80)})


def made_other(
    run: Callable[..., object], make: Callable[[Problem], tuple], p: Problem
) -> dict[str, Any]:
    return {"ms": measure(run, input_sets(make, p), p, budget=80)}


def line(p: Problem, name: str, row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{p.name} {name:30} {row['error']}"
    ms = row["ms"]["median"]
    text = f"{p.name} {name:30} {ms:9.3f} ms {row['floor ms']:9.3f} {row['of floor']:6.1%}"
    for other, found in row["others"].items():
        ratio = f"{found['ms']['median'] / ms:.2f}x" if "ms" in found else found["error"]
        text += f"  {other} {ratio}"
    if GEMM in row["others"] and "ms" in row["others"][GEMM]:
        of_gemm = ms / row["others"][GEMM]["ms"]["median"]
        text += f"  {of_gemm:.3f} GEMMs, goal {GOAL} {'met' if of_gemm <= GOAL else 'NOT met'}"
    return text


def kernel_table(record: Record, problems: list[Problem]) -> None:
    floors = floors_from(record.rows("floors"))
    failed = record.failed_groups()
    for p in problems:
        for op in OPS:
            key = f"{p.name} {op.name}"
            if op.group in failed:
                row = record.put("kernels", key, {"error": "failed its check"})
            else:
                row = record.row("kernels", key, partial(op_row, op, p, floors))
            record.say(line(p, op.name, row))
    record.say(wins(record, problems))


def wins(record: Record, problems: list[Problem]) -> str:
    """The content of encode.TRITON_WINS that these timings call for, ready to paste."""
    major = 9 if problems[0].rehearsal else torch.cuda.get_device_capability()[0]
    won, rows = [], record.rows("kernels")
    for p in problems:
        ours, theirs = (rows.get(f"{p.name} encode {name}", {}) for name in ("triton", "cublas"))
        if "ms" in ours and "ms" in theirs and ours["ms"]["median"] < theirs["ms"]["median"]:
            won.append(f"({major}, {p.D}, {p.F})")
    content = "{" + ", ".join(won) + "}" if won else "set()"
    text = f"TRITON_WINS: set[tuple[int, int, int]] = {content}"
    record.put("kernels", "TRITON_WINS", {"line": text})
    return text


# --- other tiles ----------------------------------------------------------------------------

CANDIDATES = [
    Tiles(128, 256, 64, 8, 4),
    Tiles(128, 256, 32, 8, 4),
    Tiles(256, 128, 64, 8, 3),
    Tiles(256, 128, 64, 8, 4),
    Tiles(128, 128, 64, 8, 4),
    Tiles(128, 128, 64, 4, 4),
    Tiles(128, 128, 128, 8, 3),
]
"""Tried beside those that ship, and those with other bands."""

BANDS = 4, 8, 16


def tile_row(tiles: Tiles, band: int, p: Problem) -> dict[str, Any]:
    """Time of the encoder in other tiles, once it is exact on integers."""
    with ExitStack() as stack:
        stack.enter_context(encoding("triton"))
        stack.enter_context(patch.object(_encode_kernel, "tiles_for", lambda x: tiles))
        stack.enter_context(patch.object(_encode_kernel, "BAND", band))
        with poisoned():
            exact_check(p.of(N=300, F=16384), "triton", "value", encoder_dtype(p))
        return {"ms": measure(encode_topk, input_sets(encode_inputs, p), p, budget=150)}


def tune(record: Record, problems: list[Problem]) -> None:
    """Tiles and bands of our encoder, per shape."""
    for p in problems:
        shipped = tiles_for(torch.empty(0, p.D, dtype=encoder_dtype(p), device=p.device))
        tries = [(shipped, band) for band in BANDS] + [(tiles, 8) for tiles in CANDIDATES]
        for tiles, band in tries[:2] if p.rehearsal else tries:
            name = f"n{tiles.n} f{tiles.f} d{tiles.d} w{tiles.warps} s{tiles.stages} band {band}"
            row = record.row("tune", f"{p.name} {name}", partial(tile_row, tiles, band, p))
            ms = f"{row['ms']['median']:9.3f} ms" if "ms" in row else row["error"]
            record.say(f"{p.name} {name:30} {ms}")
