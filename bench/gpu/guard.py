"""Starts the GPU benchmark in a process of its own, and again if that one dies.

A kernel that reads where it must not takes its process's GPU context with it, a crash of the
compiler its process. What was measured is in the file; the new process goes on after what failed.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DONE, FAILED, INTERRUPTED = 0, 10, 130
"""Exit codes of a process that got to the end, every check passed or not, or was stopped."""

RESTARTS = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, at tiny shapes")
    parser.add_argument("--shapes", nargs="+", choices=list("ABCD"), default=list("ABCD"))
    parser.add_argument("--parts", nargs="+", help="of run.py; all but tune, unless stated")
    parser.add_argument("--tune", action="store_true", help="also other tiles of the encoder")
    parser.add_argument("--commit", help="of these sources, where git cannot tell")
    parser.add_argument("--out", type=Path, help="folder of the JSON: $OUT or bench/results")
    parser.add_argument("--since", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--again", action="store_true", help=argparse.SUPPRESS)


def folder(arguments: argparse.Namespace) -> Path:
    if arguments.out is not None:
        return arguments.out
    if arguments.rehearse:
        return Path(tempfile.mkdtemp(prefix="fastsae-rehearsal-"))
    return Path(os.environ.get("OUT") or Path(__file__).parents[1] / "results")


def guarded(arguments: argparse.Namespace) -> int:
    environment = {
        **os.environ,
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "PYTHONUNBUFFERED": "1",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    }
    kernels = str(Path(__file__).parents[2] / "kernels")
    environment["PYTHONPATH"] = os.pathsep.join(
        path for path in (os.environ.get("PYTHONPATH"), kernels) if path
    )
    if arguments.rehearse:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    out = folder(arguments)
    command = [sys.executable, "-m", "bench", *sys.argv[1:], "--since", str(time.time())]
    command += ["--out", str(out)]
    for again in range(RESTARTS):
        before = written(out)
        code = subprocess.call(command + ["--again"] * (again > 0), env=environment)
        if code in (DONE, FAILED, INTERRUPTED) or written(out) == before:
            return code
        print(f"the process died (exit code {code}): starting again after that row", flush=True)
    return 1


def written(out: Path) -> list[int]:
    """When results were last written: a process that died without any would do so again."""
    return [path.stat().st_mtime_ns for path in out.glob("gpu-*.json")]
