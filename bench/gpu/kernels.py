"""The kernel table: each op at each shape, against its floor and against plain PyTorch."""

from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from fastsae_kernels import _encode_kernel, encode_topk
from fastsae_kernels._encode_kernel import Tiles, tiles_for

from .checks import FIRST_GROUPS, poisoned
from .checks_encode import encoder_dtype, exact_check
from .clock import Cost, Floors, attempt, digits, floors_from, free, input_sets, measure, shown
from .data import Problem
from .op import Op, Way
from .ops import GEMM, OPS, encode_inputs, encoding
from .record import Record

GOAL = 1.15
"""Multiple of the bare product that the encoder may take."""


def op_row(op: Op, p: Problem, floors: Floors) -> dict[str, Any]:
    """Time, floor and fraction of it; the same op by other means."""
    torch.manual_seed(0)
    free()
    sets = input_sets(op.make, p)
    cost = op.cost(p, *sets[0])
    ways = {name: way for name, way in op.others.items() if p.name in way.shapes}
    found = {}
    with op.around():
        row = measure(op.run, sets, p)
        for name, way in ways.items():
            if way.make is None:
                found[name] = attempt(partial(measure, way.run, sets, p, budget=80))
        del sets
        for name, way in ways.items():
            if way.make is not None:
                free()
                found[name] = attempt(partial(made, way, p))
    return compared(row, p, cost, floors) | {"others": with_ratios(found, row["ms"]["median"])}


def made(way: Way, p: Problem) -> dict[str, Any]:
    assert way.make is not None
    return measure(way.run, input_sets(way.make, p), p, budget=80)


def compared(row: dict[str, Any], p: Problem, cost: Cost, floors: Floors) -> dict[str, Any]:
    """A time with what was done in it, and with the floor."""
    ms, floor = row["ms"]["median"], floors.ms(cost)
    row |= {"shape": {"N": p.N, "D": p.D, "F": p.F, "K": p.K}}
    row |= {"bytes": cost.bytes, "GB/s": digits(cost.bytes / ms / 1e6)}
    row |= {"flops": cost.flops, "TFLOP/s": digits(cost.flops / ms / 1e9)}
    row |= {"floor ms": round(floor, 4), "of floor": round(floor / ms, 4)}
    if cost.gathered:
        row["gathered, of copy"] = round(cost.gathered / floors.bandwidth * 1e3 / ms, 3)
    return row


def with_ratios(found: dict[str, dict[str, Any]], ms: float) -> dict[str, dict[str, Any]]:
    """Times by other means, as multiples of ours."""
    return {
        name: other | ({"ratio": round(other["ms"]["median"] / ms, 4)} if "ms" in other else {})
        for name, other in found.items()
    }


def line(p: Problem, name: str, row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{p.name} {name:30} {row['error'][:80]}"
    text = f"{p.name} {name:30} {row['ms']['median']:9.3f} ms"
    text += f" {shown(row['floor ms'], '9.3f')} {shown(row['of floor'], '6.1%')}"
    for other, found in row["others"].items():
        text += f"  {other} " + (f"{found['ratio']:.2f}x" if "ms" in found else found["error"][:40])
    if "ms" in row["others"].get(GEMM, {}):
        of_gemm = row["ms"]["median"] / row["others"][GEMM]["ms"]["median"]
        text += f"  {of_gemm:.3f} GEMMs, goal {GOAL} {'met' if of_gemm <= GOAL else 'NOT met'}"
    return text


def kernel_table(record: Record, problems: list[Problem], part: str, ops: list[Op]) -> None:
    floors = floors_from(record.rows("floors"))
    for op in ops:
        unfit = record.unfit(op.group)
        for p in problems:
            key = f"{p.name} {op.name}"
            if unfit:
                row = record.put(part, key, {"error": unfit})
            else:
                row = record.row(part, key, partial(op_row, op, p, floors))
            record.say(line(p, op.name, row))
    if part == "kernels":
        record.say(wins(record, problems))


FIRST_OPS = [op for op in OPS if op.group in FIRST_GROUPS]
MORE_OPS = [op for op in OPS if op.group not in FIRST_GROUPS]
first_table = partial(kernel_table, part="kernels", ops=FIRST_OPS)
more_table = partial(kernel_table, part="more kernels", ops=MORE_OPS)


def won(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """By 2 %, and in every call."""
    if "ms" not in ours or "ms" not in theirs:
        return False
    us, them = ours["ms"], theirs["ms"]
    return them["median"] >= 1.02 * us["median"] and us["max"] < them["min"]


def wins(record: Record, problems: list[Problem]) -> str:
    """The content of encode.TRITON_WINS that these timings call for, ready to paste."""
    major = 9 if problems[0].rehearsal else torch.cuda.get_device_capability()[0]
    rows = record.rows("kernels")
    found = [
        f"({major}, {p.D}, {p.F})"
        for p in problems
        if won(*(rows.get(f"{p.name} encode {form}", {}) for form in ("triton", "cublas")))
    ]
    content = "{" + ", ".join(found) + "}" if found else "set()"
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
        return measure(encode_topk, input_sets(encode_inputs, p), p, budget=150)


def tune(record: Record, problems: list[Problem]) -> None:
    """Tiles and bands of our encoder, at the two shapes that differ most."""
    for p in problems:
        if p.name not in "AC":
            continue
        shipped = tiles_for(torch.empty(0, p.D, dtype=encoder_dtype(p), device=p.device))
        tries = [(shipped, band) for band in BANDS] + [(tiles, 8) for tiles in CANDIDATES]
        for tiles, band in tries[:2] if p.rehearsal else tries:
            name = f"n{tiles.n} f{tiles.f} d{tiles.d} w{tiles.warps} s{tiles.stages} band {band}"
            row = record.row("tune", f"{p.name} {name}", partial(tile_row, tiles, band, p))
            ms = f"{row['ms']['median']:9.3f} ms" if "ms" in row else row["error"]
            record.say(f"{p.name} {name:30} {ms}")
