"""Everything to be known of a GPU in one run of under eight minutes.

Checks of every kernel, this machine's ceilings, a table of kernels, a table of whole training
steps; `--rehearse` goes through all of it on a CPU, at tiny shapes, through Triton's interpreter.
"""

import argparse
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import chain
from typing import Any

import torch

from fastsae_kernels._launch import interpreted

from . import kernels, step
from .checks import outcome, sparse_checks
from .checks_encode import encode_checks, topk_checks
from .checks_train import train_checks
from .clock import KINDS, copy_row, product_row
from .data import Problem, problems
from .guard import DONE, FAILED
from .record import NOT_RUN, Record


def check_all(record: Record, shapes: list[Problem]) -> None:
    parts = (topk_checks, encode_checks, sparse_checks, train_checks)
    for check in chain.from_iterable(part(shapes) for part in parts):
        row = record.row("checks", f"{check.group}: {check.name}", partial(outcome, check))
        record.say(f"{check.name:64} {said_of(row)}")


def said_of(row: dict[str, Any]) -> str:
    if row.get("error") in NOT_RUN:
        return row["error"]
    loud = f" (not deterministic: {row['not deterministic']})" if "not deterministic" in row else ""
    return f"FAILED: {row['error']}" if "error" in row else "ok" + loud


def measure_floors(record: Record, shapes: list[Problem]) -> None:
    device = shapes[0].device
    side = 64 if shapes[0].rehearsal else 8192
    square = Problem("square", side, side, side, 1, device)
    rows = {"copy": partial(copy_row, device)}
    for kind in KINDS:
        rows[f"{kind} square"] = partial(product_row, square, kind)
    for p in shapes:
        for kind in ("bf16", "tf32"):
            rows[f"{kind} {p.name}"] = partial(product_row, p, kind)
    for name, work in rows.items():
        row = record.row("floors", name, work)
        record.say(f"{name:12} " + ", ".join(f"{key} {value}" for key, value in row.items()))


def short_table(record: Record, shapes: list[Problem]) -> None:
    """What has been measured, last, where a reader of the end of the output finds it."""
    print(f"\n{record.stamp['gpu']}, commit {record.stamp['commit']}, {record.path}")
    for name, row in record.rows("floors").items():
        rate = [f"{row[unit]} {unit}" for unit in ("GB/s", "TFLOP/s") if unit in row]
        print(f"  {name:12} {rate[0] if rate else row}")
    print(f"  {'':30} {'median':>9}    {'floor':>9} of it  others, as multiples of ours")
    for p in shapes:
        for op in kernels.OPS:
            row = record.rows("kernels").get(f"{p.name} {op.name}")
            if row is not None:
                print(kernels.line(p, op.name, row))
    for key, row in record.rows("tune").items():
        print(f"{key:40} {row['ms']['median'] if 'ms' in row else row['error'][:60]}")
    for p in shapes:
        found = record.rows("step").get(p.name)
        if found is not None:
            for name in step.kinds(p):
                print(step.line(p, name, found.get("rows", {}).get(name, found)))
    print(record.rows("kernels").get("TRITON_WINS", {}).get("line", ""))
    checks, failed = record.rows("checks"), record.failed()
    skipped = sum(row.get("error") in NOT_RUN for row in checks.values())
    passed = len(checks) - len(failed) - skipped
    print(f"{passed} checks passed, {len(failed)} FAILED, {skipped} not run", flush=True)
    for key, row in failed.items():
        print(f"  FAILED {key}: {row['error'][:110]}", flush=True)


Part = Callable[[Record, list[Problem]], None]


def wanted_parts(arguments: argparse.Namespace) -> dict[str, Part]:
    """What to run, in order; the ceilings with all that is compared with them."""
    parts = dict.fromkeys(arguments.parts)
    if set(parts) != {"checks"}:
        parts["floors"] = None
    if arguments.tune:
        parts["tune"] = None
    return {name: run for name, run in PARTS.items() if name in parts}


PARTS: dict[str, Part] = {
    "checks": check_all,
    "floors": measure_floors,
    "kernels": kernels.kernel_table,
    "tune": kernels.tune,
    "step": step.step_table,
}


def bench(arguments: argparse.Namespace) -> int:
    shapes = problems(arguments.shapes, arguments.rehearse)
    device, broken = shapes[0].device, False
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA GPU here: --rehearse goes through the same program on a CPU")
    record = Record(arguments.out, device, arguments.since, arguments.again)
    for name, run in wanted_parts(arguments).items():
        record.begin(name, arguments.again)
        try:
            with interpreted() if arguments.rehearse else nullcontext():
                run(record, shapes)
        except Exception:  # a mistake of this program: the other parts are worth having
            traceback.print_exc()
            broken = True
        record.end(name)
    short_table(record, shapes)
    return FAILED if broken or record.failed() else DONE
