"""The short table: what has been measured, where a reader of the end of the output finds it."""

from collections.abc import Iterator

from bench import kernels
from bench.record import Record

from . import proof, step

ROOM = 11_800
"""Characters, of the 12,000 that a machine far away may send back."""

MOST = 10
"""Failures that are listed, and kernels of a step."""


def lines_of(record: Record) -> Iterator[str]:
    """The most valuable last."""
    for key, row in reversed(record.rows("kernels").items()):
        yield f"{key:34} {kernels.line(row)}"
    for name, row in record.rows("floors").items():
        rate = [f"{row[unit]} {unit}" for unit in ("GB/s", "TFLOP/s") if unit in row]
        yield f"  {name:20} {rate[0] if rate else row.get('error')}{step.clocks(row)}"
    for key in record.rows("profile"):
        if step.WINDOW in key:
            yield from (key, *step.profile_lines(record, key, MOST))
    for key, row in record.rows("step").items():
        yield step.line(key, row)
    for node, error in list(proof.failures(record).items())[:MOST]:
        yield f"  FAILED {node[-70:]}: {' '.join(error.split())[:90]}"
    for part in ("core tests", "tests"):
        for row in record.rows(part).values():
            shown = [key for key in ("ended", "passed", "skipped", "failed", "error") if key in row]
            yield f"{part}: " + ", ".join(f"{key} {row[key]}" for key in shown)


def short_table(record: Record) -> str:
    """The lines that there is room for; the first are left out."""
    header = f"{record.stamp['gpu']}, commit {record.stamp['commit']}, {record.path}"
    lines = [*lines_of(record)]
    whole = len(lines)
    while sum(map(len, lines)) + len(lines) + len(header) + 80 > ROOM:
        lines.pop(0)
    if len(lines) < whole:
        lines.insert(0, f"({whole - len(lines)} rows are in the file alone)")
    return "\n".join(["", header, *lines])
