"""The proof that timings rest on: the project's own tests, run by pytest on the GPU.

A failed test marks the rows of what it tests as UNVERIFIED; it keeps nothing from being measured.
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

from bench.record import ROOT, Record

STEP_OPS = "topk", "encode_topk", "squared_error", "latent_major", "adam_", "step"
"""What a training step is made of."""

WORKERS = {True: ["-n", "4"], False: ["-n", "8", "--dist", "loadfile"]}
"""Where pytest-xdist is installed, processes for core tests and for others: no more, and those of
a file one after another, so that the largest fit into memory together."""


def run_tests(record: Record, part: str, dry: bool, core: bool) -> None:
    """Those marked core: every kernel once at real widths; or all others."""
    folders = ["tests/gpu"] if core or dry else ["tests/gpu", "tests/kernels"]
    row = record.row(part, "pytest", lambda: outcomes(record, part, folders, dry, core), 1e9)
    mark_rows(record)
    record.say(", ".join(f"{key} {value}" for key, value in row.items() if key != "core"))


def outcomes(
    record: Record, part: str, folders: list[str], dry: bool, core: bool
) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "outcomes.jsonl"
        select = [*folders, "-m", "core" if core else "not core"]
        ended = run_pytest(select, file, dry, record, part)
        lines = file.read_text().splitlines() if file.exists() else []
    found = [json.loads(line) for line in lines]
    counts = {o: sum(one[1] == o for one in found) for o in ("passed", "skipped", "failed")}
    passed = sorted(node for node, outcome, _ in found if outcome == "passed")
    failed = {node: error for node, outcome, error in found if outcome == "failed"}
    return {"ended": ended, **counts, "failures": failed} | ({"core": passed} if core else {})


def run_pytest(select: list[str], file: Path, dry: bool, record: Record, part: str) -> str:
    """How it ended: a timeout ends all of its processes."""
    # An empty addopts: the project's ask for plugins that a GPU's machine may lack.
    command = [sys.executable, "-m", "pytest", *select, "-o", "addopts=", "-q", "--no-header"]
    command += ["--import-mode=importlib", "-p", "no:cacheprovider", "-p", "bench.gpu.outcomes"]
    if find_spec("xdist") is not None:
        command += ["-n", "0"] if dry else WORKERS["core" in select]
    environment = {**os.environ, "FASTSAE_OUTCOMES": str(file)}
    if dry:
        environment["FASTSAE_TINY"] = "1"
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        code = process.wait(None if dry else max(1, record.left(part)))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return "out of time"
    return {0: "all passed", 1: "some failed", 5: "no test"}.get(code, f"exit code {code}")


# --- what tests say of rows -----------------------------------------------------------------


def failures(record: Record) -> dict[str, str]:
    """Error by node id of the tests that failed."""
    rows = (record.rows(part).get("pytest", {}) for part in ("core tests", "tests"))
    return {node: error for row in rows for node, error in row.get("failures", {}).items()}


def concerns(node: str, op: str) -> bool:
    """Whether a test is of an op: it is in the op's file, or has its name among its parameters."""
    file, _, test = node.partition("::")
    stems = {"adam_": "adam", "encode_topk": "encode", "encode_topk_batch": "topk_batch"}
    stems |= {"rotation_gradients": "rotation", "squared_error": "loss", "jumprelu_l0": "jumprelu"}
    stems |= dict.fromkeys(("decode", "gather_dot", "scatter_outer", "latent_major"), "sparse")
    stem = stems.get(op, op)
    return file.endswith(f"/test_{stem}.py") or op in re.split(r"[\[\]\-]", test)


def unverified(record: Record, ops: tuple[str, ...]) -> str:
    """Why a row of these ops is not to be trusted; empty where its tests have passed."""
    failed = failures(record)
    for op in ops:
        for node, error in failed.items():
            if concerns(node, op):
                return f"{node}: {error[:150]}"
    passed = record.rows("core tests").get("pytest", {}).get("core", [])
    untested = [op for op in ops if not any(concerns(node, op) for node in passed)]
    return f"not tested: {', '.join(untested)}" if untested else ""


def mark_rows(record: Record) -> None:
    """Mark every row of ours that was measured."""
    for part in ("step", "kernels"):
        for key, row in record.rows(part).items():
            if "ms" not in row or " dense" in key:
                continue
            reason = unverified(record, (row["op"],) if part == "kernels" else STEP_OPS)
            row.pop("unverified", None)
            record.put(part, key, row | ({"unverified": reason} if reason else {}))
