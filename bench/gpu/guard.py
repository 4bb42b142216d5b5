"""Runs the full GPU benchmark in under eight minutes: tests, training steps, profiles and kernels.

It runs in its own process, which is started again if it dies: an illegal memory access destroys the
CUDA context, a crash of the compiler the process. Results are saved after every row, so the new
process continues after the one that failed. Parts, in order: compile, floors, core tests, step,
kernels, tests. Rows whose tests failed are marked UNVERIFIED. The last lines are a short table.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DONE, FAILED, INTERRUPTED = 0, 10, 130
"""Exit codes: finished and every test passed; finished with failures; interrupted."""

RESTARTS = 10

ALLOCATOR = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
"""The best allocator for large tensors; some drivers do not support it."""

PROBE = "import torch; torch.ones(1 << 26, device='cuda').sum().item()"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--dry-run", action="store_true", help="run the whole benchmark on a CPU at tiny sizes")
    shapes = "shapes to run, in this order (default: B C A D)"
    add("--shapes", nargs="+", choices=list("ABCD"), default=list("BCAD"), help=shapes)
    add("--parts", nargs="+", help="which parts to run (default: all)")
    add("--commit", default="", help="commit hash to record when git is unavailable")
    add("--out", type=Path, help="directory of the JSON file (default: $OUT or bench/results)")
    add("--since", type=float, help=argparse.SUPPRESS)
    add("--again", action="store_true", help=argparse.SUPPRESS)


def folder(arguments: argparse.Namespace) -> Path:
    """Where results go; a dry run's, by default, to a temporary directory."""
    if arguments.out is None and arguments.dry_run:
        return Path(tempfile.mkdtemp(prefix="fastsae-dry-run-"))
    return arguments.out or Path(os.environ.get("OUT") or Path(__file__).parents[1] / "results")


def environment(dry_run: bool) -> dict[str, str]:
    """Environment variables of the benchmark's processes."""
    root = Path(__file__).parents[2]
    paths = os.environ.get("PYTHONPATH"), str(root), str(root / "kernels")
    found = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONUNBUFFERED": "1"}
    found["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    if dry_run:
        return found | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", PROBE]
    if subprocess.run(command, env=found | ALLOCATOR, capture_output=True).returncode:
        print(f"this machine does not support {ALLOCATOR}: running without it", flush=True)
        return found
    return found | ALLOCATOR


def bench(arguments: argparse.Namespace) -> int:
    """Start the process that measures; inside that process (it has --since), measure."""
    if arguments.since is None:
        return guarded(arguments)
    from .run import bench

    return bench(arguments)


def guarded(arguments: argparse.Namespace) -> int:
    """Run the measuring process, again each time it dies; returns the last exit code."""
    since, out, variables = time.time(), folder(arguments), environment(arguments.dry_run)
    command = [sys.executable, "-m", "bench", *sys.argv[1:], f"--since={since}", f"--out={out}"]
    for again in range(RESTARTS):
        before = written(out)
        code = subprocess.call(command + ["--again"] * (again > 0), env=variables)
        if code in (DONE, FAILED, INTERRUPTED) or written(out) == before:
            return code
        print(f"the process died (exit code {code}): continuing after that row", flush=True)
    return 1


def written(out: Path) -> list[int]:
    """When results were last written: a process that died before that would die there again."""
    return [path.stat().st_mtime_ns for path in out.glob("gpu-*.json")]
