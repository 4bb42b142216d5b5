"""The short table: what has been measured, where a reader of the end of the output finds it."""

from collections.abc import Iterator

from bench.kernels import line as kernel_line
from bench.record import Record

from . import proof, step

ROOM = 11_800
"""Characters, of the 12,000 that a machine far away may send back."""

MOST = 10
"""Failures that are listed, and kernels of a step."""


def kernel_lines(record: Record) -> Iterator[str]:
    for key, row in reversed(record.rows("kernels").items()):
        yield f"{key:34} {kernel_line(row)}"


def profile_lines(record: Record) -> Iterator[str]:
    for key in record.rows("profile"):
        if step.WINDOW in key:
            yield key
            yield from step.profile_lines(record, key, MOST)


def floor_lines(record: Record) -> Iterator[str]:
    for name, row in record.rows("floors").items():
        rate = [f"{row[unit]} {unit}" for unit in ("GB/s", "TFLOP/s") if unit in row]
        clocks = f" {row['SM MHz']:.0f} MHz {row['W']:.0f} W" if "SM MHz" in row else ""
        yield f"  {name:20} {rate[0] if rate else row.get('error')}{clocks}"


def test_lines(record: Record) -> Iterator[str]:
    failed = proof.failures(record)
    for node, error in list(failed.items())[:MOST]:
        yield f"  FAILED {node[-70:]}: {' '.join(error.split())[:90]}"
    for part in ("core tests", "tests"):
        for row in record.rows(part).values():
            yield f"{part}: " + ", ".join(
                f"{key} {row[key]}" for key in ("ended", "passed", "skipped", "failed", "error")
                if key in row
            )  # fmt: skip


def short_table(record: Record) -> str:
    """The most valuable rows last; the first are left out where there is no room."""
    header = f"{record.stamp['gpu']}, commit {record.stamp['commit']}, {record.path}"
    header += "; median ms, floor ms and part of it, others as multiples of ours"
    lines = [*kernel_lines(record), *floor_lines(record), *profile_lines(record)]
    lines += [step.line(key, row) for key, row in record.rows("step").items()]
    lines += test_lines(record)
    whole = len(lines)
    while sum(map(len, lines)) + len(lines) + len(header) + 80 > ROOM:
        lines.pop(0)
    if len(lines) < whole:
        lines.insert(0, f"({whole - len(lines)} rows are in the file alone)")
    return "\n".join(["", header, *lines])
