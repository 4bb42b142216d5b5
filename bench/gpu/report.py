"""The short table: what has been measured, where a reader of the end of the output finds it."""

from collections.abc import Iterator
from itertools import chain

from . import kernels, step
from .data import Problem
from .ops import GEMM
from .record import NOT_RUN, Record

ROOM = 11_800
"""Characters, of the 12,000 that a machine far away may send back."""

FAILURES = 12
"""The most that are listed."""


def kernel_lines(record: Record, shapes: list[Problem], encoders: bool) -> Iterator[str]:
    rows = record.rows("kernels") | record.rows("more kernels")
    for op in kernels.FIRST_OPS + kernels.MORE_OPS:
        for p in shapes if (GEMM in op.others) == encoders else []:
            row = rows.get(f"{p.name} {op.name}")
            if row is not None:
                yield kernels.line(p, op.name, row)


def floor_lines(record: Record) -> Iterator[str]:
    for name, row in record.rows("floors").items():
        rate = [f"{row[unit]} {unit}" for unit in ("GB/s", "TFLOP/s") if unit in row]
        yield f"  {name:12} {rate[0] if rate else row.get('error')}"


def tune_lines(record: Record) -> Iterator[str]:
    for key, row in record.rows("tune").items():
        yield f"{key:40} {row['ms']['median'] if 'ms' in row else row['error'][:60]}"


def step_lines(record: Record, shapes: list[Problem]) -> Iterator[str]:
    for p in shapes:
        found = record.rows("step").get(p.name)
        if found is not None:
            for name in step.contenders(p):
                yield step.line(p, name, found.get("rows", {}).get(name, found))


def check_lines(record: Record) -> Iterator[str]:
    checks, failed = record.checks(), record.failed()
    unlucky = [key for key, row in checks.items() if "unlucky" in row]
    skipped = sum(row.get("error") in NOT_RUN for row in checks.values())
    passed = len(checks) - len(failed) - skipped
    for key in unlucky[:FAILURES]:
        yield f"  unlucky once {key}: {checks[key]['unlucky'].splitlines()[0][:90]}"
    for key, row in list(failed.items())[:FAILURES]:
        yield f"  FAILED {key}: {row['error'][:110]}"
    yield f"{passed} checks passed, {len(failed)} FAILED, {skipped} not run"


def short_table(record: Record, shapes: list[Problem]) -> str:
    """The most valuable rows last; the first are left out where there is no room."""
    header = f"{record.stamp['gpu']}, commit {record.stamp['commit']}, {record.path}"
    header += "; median ms, floor ms and part of it, others as multiples of ours"
    lines = list(
        chain(
            kernel_lines(record, shapes, encoders=False),
            tune_lines(record),
            floor_lines(record),
            kernel_lines(record, shapes, encoders=True),
            [record.rows("kernels").get("TRITON_WINS", {}).get("line", "")],
            step_lines(record, shapes),
            check_lines(record),
        )
    )
    whole = len(lines)
    while sum(map(len, lines)) + len(lines) + len(header) + 80 > ROOM:
        lines.pop(0)
    if len(lines) < whole:
        lines.insert(0, f"({whole - len(lines)} rows are in the file alone)")
    return "\n".join(["", header, *lines])
