"""Runs the project's tests on the GPU, and marks timings whose tests failed as UNVERIFIED.

A failed test does not stop anything from being measured.
"""

import json
import os
import re
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.clock import free
from bench.ops import OPS
from bench.record import ROOT, Record

STEP_OPS = *dict.fromkeys(op.function for op in OPS if op.step), "step"
"""Ops that training steps use."""

WORKERS = {True: ["-n", "4"], False: ["-n", "8", "--dist", "loadfile"]}
"""Options of pytest-xdist, if it is installed, for core tests and for all others: few enough
processes, and one per test file, that the largest tests fit in memory together."""

FILES = {op.function: op.run.__module__.rpartition(".")[2] for op in OPS}
FILES |= {"adam_": "adam", "latent_major": "sparse"}
"""The test file of each op, tests/kernels/test_NAME.py: named after the op's module."""


def run_tests(record: Record, part: str, dry: bool) -> None:
    """Run the tests marked core (every kernel once at real widths), or all others."""

    def outcomes() -> dict[str, Any]:
        free()  # the tests' processes need the memory that this one caches
        with TemporaryDirectory() as folder:
            file = Path(folder) / "outcomes.jsonl"
            ended = run_pytest(part == "core tests", file, dry, record.left(part))
            lines = file.read_text().splitlines() if file.exists() else []
        found = [json.loads(line) for line in lines]
        counts = {o: sum(one[1] == o for one in found) for o in ("passed", "skipped", "failed")}
        passed = sorted(node for node, outcome, _ in found if outcome == "passed")
        failed = {node: error for node, outcome, error in found if outcome == "failed"}
        return {"ended": ended, **counts, "failures": failed, "nodes": passed}

    row = record.row(part, "pytest", outcomes, 1e9)
    record.log(", ".join(f"{key} {value}" for key, value in row.items() if key != "nodes"))
    mark_rows(record)


def run_pytest(core: bool, file: Path, dry: bool, seconds: float) -> str:
    """Run pytest, kill all of its processes after `seconds`, and return how it ended."""
    # Without the project's addopts, which need plugins that a GPU machine may lack; and its other
    # versions of libraries may warn, which is not a failure.
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-o", "filterwarnings=default"]
    command += ["-q", "--import-mode=importlib"]
    command += ["-p", "no:cacheprovider", "-p", "bench.gpu.outcomes", "tests/gpu"]
    command += ["-m", "core"] if core else ["-m", "not core", *["tests/kernels"] * (not dry)]
    if find_spec("xdist") is not None:
        command += ["-n", "0"] if dry else WORKERS[core]
    environment = {**os.environ, "FASTSAE_OUTCOMES": str(file), "FASTSAE_TINY": "1" if dry else ""}
    places: dict[str, Any] = {"cwd": ROOT, "stdout": subprocess.DEVNULL, "start_new_session": True}
    process = subprocess.Popen(command, env=environment, **places)
    try:
        code = process.wait(None if dry else max(1, seconds))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return "out of time"
    return {0: "all passed", 1: "some failed"}.get(code, f"exit code {code}")


def failures(record: Record) -> dict[str, str]:
    """Errors of failed tests, by node ID."""
    rows = (record.rows(part).get("pytest", {}) for part in ("core tests", "tests"))
    return {node: error for row in rows for node, error in row.get("failures", {}).items()}


def covers(node: str, op: str) -> bool:
    """Whether a test covers an op: it is in the op's file, or the op is one of its parameters."""
    file, _, test = node.partition("::")
    named = op in re.split(r"[\[\]\-]", test) or op == "step" and "test_step" in file
    return named or file.endswith(f"/test_{FILES.get(op, op)}.py")


def unverified(record: Record, ops: tuple[str, ...]) -> str:
    """Why a row of these ops is unverified; empty if all their tests passed."""
    for node, error in failures(record).items():
        if any(covers(node, op) for op in ops):
            return f"{node}: {error[:150]}"
    passed = record.rows("core tests").get("pytest", {}).get("nodes", [])
    untested = [op for op in ops if not any(covers(node, op) for node in passed)]
    return f"not tested: {', '.join(untested)}" if untested else ""


def mark_rows(record: Record) -> None:
    """Mark fastsae's measured rows as unverified, or remove the mark."""
    for part in ("step", "kernels"):
        for key, row in record.rows(part).items():
            reason = unverified(record, (row["op"],) if "op" in row else STEP_OPS)
            row.pop("unverified", None)
            if "ms" in row and " dense" not in key.partition(",")[0] and reason:
                row["unverified"] = reason
    record.save()
