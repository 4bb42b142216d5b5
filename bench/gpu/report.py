"""The short table of results that ends the output."""

from collections.abc import Iterator

from bench import kernels
from bench.record import Record

from . import proof, step

MAX_CHARACTERS = 11_800
"""A remote runner may return only the last 12,000 characters of the output."""

MAX_LISTED = 10
"""Most failures, and most kernels per step, that are listed."""


def lines_of(record: Record) -> Iterator[str]:
    """Lines in order of increasing importance."""
    for key, row in reversed(record.rows("kernels").items()):
        yield f"{key:34} {kernels.line(row)}"
    for name, row in record.rows("floors").items():
        rate = [f"{row[unit]} {unit}" for unit in ("GB/s", "TFLOP/s") if unit in row]
        yield f"  {name:20} {rate[0] if rate else row.get('error')}{step.clocks(row)}"
    for key in record.rows("profile"):
        if step.WINDOW in key:
            yield from (key, *step.profile_lines(record, key, MAX_LISTED))
    for key, row in record.rows("step").items():
        yield step.line(key, row)
    for node, error in list(proof.failures(record).items())[:MAX_LISTED]:
        yield f"  FAILED {node[-70:]}: {' '.join(error.split())[:90]}"
    for part in ("core tests", "tests"):
        for row in record.rows(part).values():
            shown = [key for key in ("ended", "passed", "skipped", "failed", "error") if key in row]
            yield f"{part}: " + ", ".join(f"{key} {row[key]}" for key in shown)


def short_table(record: Record) -> str:
    """As many lines as fit; the least important are dropped."""
    header = f"{record.stamp['gpu']}, commit {record.stamp['commit']}, {record.path}"
    lines = [*lines_of(record)]
    total = len(lines)
    while sum(map(len, lines)) + len(lines) + len(header) + 80 > MAX_CHARACTERS:
        lines.pop(0)
    if len(lines) < total:
        lines.insert(0, f"({total - len(lines)} more rows are in the file)")
    return "\n".join(["", header, *lines])
