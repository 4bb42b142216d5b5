"""Everything to be known of a GPU in one run of under eight minutes.

This machine's ceilings, checks of what a step is made of, whole training steps, a table of its
kernels, then checks and timings of the others; `--rehearse` goes through all of it on a CPU, at
tiny shapes, through Triton's interpreter.
"""

import argparse
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch

from fastsae_kernels._launch import interpreted

from .checks import Check, outcome, sparse_checks
from .checks_encode import encode_checks, topk_checks
from .checks_rotation import rotation_checks
from .checks_train import train_checks
from .clock import PRODUCTS, copy_row, product_row
from .data import Problem, problems
from .guard import DONE, FAILED
from .kernels import first_table, more_table, tune
from .record import NOT_RUN, Record
from .report import short_table
from .step import step_table


def all_checks(shapes: list[Problem]) -> Iterator[Check]:
    parts = train_checks, topk_checks, encode_checks, sparse_checks, rotation_checks
    return chain.from_iterable(part(shapes) for part in parts)


def run_checks(record: Record, shapes: list[Problem], part: str, first: bool) -> None:
    for check in all_checks(shapes):
        if check.first == first:
            row = record.row(part, f"{check.group}: {check.name}", partial(outcome, check))
            record.say(f"{check.name:64} {said_of(row)}")


def said_of(row: dict[str, Any]) -> str:
    if row.get("error") in NOT_RUN:
        return row["error"]
    if "error" in row:
        return f"FAILED: {row['error']}"
    return f"ok, but unlucky once: {row['unlucky'][:100]}" if "unlucky" in row else "ok"


def measure_floors(record: Record, shapes: list[Problem]) -> None:
    device = shapes[0].device
    side = 64 if shapes[0].rehearsal else 8192
    square = Problem("square", side, side, side, 1, device)
    rows = {"copy": partial(copy_row, device)}
    for kind in PRODUCTS:
        rows[f"{kind} square"] = partial(product_row, square, kind)
    for p in shapes:
        rows[f"bf16 {p.name}"] = partial(product_row, p, "bf16")
    for name, work in rows.items():
        row = record.row("floors", name, work)
        record.say(f"{name:12} " + ", ".join(f"{key} {value}" for key, value in row.items()))


class Part(NamedTuple):
    run: Callable[[Record, list[Problem]], None]
    seconds: float
    """After which it begins no row."""


PARTS = {
    "floors": Part(measure_floors, 30),
    "checks": Part(partial(run_checks, part="checks", first=True), 150),
    "step": Part(step_table, 120),
    "kernels": Part(first_table, 100),
    "tune": Part(tune, 60),
    "more checks": Part(partial(run_checks, part="more checks", first=False), 80),
    "more kernels": Part(more_table, 80),
}
"""In order; all of it ends with record.LAST."""

ALWAYS = "floors", "checks"
"""What the other parts are compared with, and wait for."""


def wanted_parts(arguments: argparse.Namespace) -> dict[str, Part]:
    names = {*(arguments.parts or PARTS.keys() - {"tune"}), *ALWAYS}
    if arguments.tune:
        names.add("tune")
    if names - PARTS.keys():
        raise SystemExit(f"no such part: {sorted(names - PARTS.keys())}; there are {[*PARTS]}")
    return {name: part for name, part in PARTS.items() if name in names}


def bench(arguments: argparse.Namespace) -> int:
    parts = wanted_parts(arguments)
    shapes = problems(arguments.shapes, arguments.rehearse)
    device, broken = shapes[0].device, False
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA GPU here: --rehearse goes through the same program on a CPU")
    record = Record(arguments.out, device, arguments.since, arguments.again, arguments.commit)
    for name, part in parts.items():
        record.begin(name, arguments.again, part.seconds)
        try:
            with interpreted() if arguments.rehearse else nullcontext():
                part.run(record, shapes)
        except Exception:  # a mistake of this program: the other parts are worth having
            traceback.print_exc()
            broken = True
        record.end(name)
    print(short_table(record, shapes), flush=True)
    return FAILED if broken or record.failed() else DONE
