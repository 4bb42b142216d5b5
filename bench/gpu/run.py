"""Full GPU benchmark: precompile, floors, smoke tests, training steps, kernels, all tests.

It ends within ten minutes and writes every row as soon as it is measured. `--dry-run` runs the
whole benchmark on a CPU at tiny sizes, through Triton's interpreter.
"""

import argparse
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch

from bench.kernels import line as kernel_line
from bench.kernels import op_row
from bench.ops import OPS
from bench.problem import SHAPES, TINY, Problem
from bench.record import ROOT, Record
from bench.roofs import copy_row, linear_row, product_row, roofs_from, square
from fastsae_kernels._launch import interpreted

from . import proof
from .guard import DONE, FAILED
from .monitor import Monitor
from .precompile import precompile
from .report import short_table
from .step import step_rows


@dataclass
class Run:
    """What every part gets."""

    record: Record
    problems: list[Problem]
    monitor: Monitor
    dry: bool
    again: bool
    """Whether an earlier process of this run died."""


def compile_kernels(run: Run) -> None:
    major, minor = (9, 0) if run.dry else torch.cuda.get_device_capability()
    names = "".join(p.name for p in run.problems)
    work = partial(precompile, 10 * major + minor, names, run.dry)
    row = run.record.row("compile", "triton", work, 1e9)
    run.record.say(", ".join(f"{key} {value}" for key, value in row.items()))


def measure_floors(run: Run) -> None:
    """Short bursts, and for copy and GEMM two seconds back to back, as hot as a step runs."""
    p = run.problems[0]
    rows: dict[str, Callable[[], dict[str, Any]]] = {"copy": partial(copy_row, p)}
    for precision in ("bf16", "fp8", "tf32", "fp32"):
        rows[f"{precision} square"] = partial(product_row, square(p), precision)
    rows["copy for 2 s"] = partial(copy_row, p, 2000, False)
    rows["bf16 square for 2 s"] = partial(product_row, square(p), "bf16", 2000, False)
    for q in run.problems:
        rows |= {f"{kind} {q.name}": partial(product_row, q, kind) for kind in ("bf16", "fp8")}
        rows[f"linear {q.name}"] = partial(linear_row, q)
    for name, work in rows.items():

        def watched(work=work) -> dict[str, Any]:
            start = time.time()
            return work() | run.monitor.since(start)

        row = run.record.row("floors", name, watched)
        run.record.say(f"{name:20} " + ", ".join(f"{key} {value}" for key, value in row.items()))


def time_steps(run: Run) -> None:
    run.record.begin("profile", run.again)
    step_rows(run.record, run.problems, run.monitor)
    proof.mark_rows(run.record)


def time_kernels(run: Run) -> None:
    """What a step consists of first."""
    roofs = roofs_from(run.record.rows("floors"))
    for op in sorted(OPS, key=lambda op: not op.step):
        for p in run.problems:
            key = f"{p.name} {op.name}"
            work = partial(op_row, op, p, roofs, False, ("torch",))
            run.record.say(f"{key:34} {kernel_line(run.record.row('kernels', key, work))}")
    proof.mark_rows(run.record)


def race_peers(run: Run) -> None:
    """Against other trainers, where any is installed."""
    from bench.peers.contender import CONTENDERS

    found = []
    for package in {one.package for one in CONTENDERS.values() if one.package}:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    if not found or run.dry:
        run.record.put("peers", "race", {"skipped": ", ".join(found) or "no peer is installed"})
        return
    command = [sys.executable, "-m", "bench", "peers", "--rounds", "1", "--steps", "0"]
    command += ["--shapes", *(p.name for p in run.problems)]

    def race() -> dict[str, Any]:
        limit = max(1, run.record.left("peers"))
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
        return {"output": done.stdout[-8000:], "code": done.returncode}

    run.record.say(str(run.record.row("peers", "race", race, 1e9).get("output")))


class Part(NamedTuple):
    run: Callable[[Run], None]
    seconds: float
    """After which it begins no row."""


def tests(core: bool) -> Callable[[Run], None]:
    part = "core tests" if core else "tests"
    return lambda run: proof.run_tests(run.record, part, run.dry, core)


PARTS = {
    "compile": Part(compile_kernels, 60),
    "floors": Part(measure_floors, 45),
    "core tests": Part(tests(core=True), 60),
    "step": Part(time_steps, 150),
    "kernels": Part(time_kernels, 100),
    "tests": Part(tests(core=False), 120),
    "peers": Part(race_peers, 60),
}
"""In order; all of it ends with record.LAST."""


def bench(arguments: argparse.Namespace) -> int:
    names = arguments.parts or [*PARTS]
    if unknown := set(names) - PARTS.keys():
        raise ValueError(f"parts are {', '.join(PARTS)}: got {', '.join(sorted(unknown))}")
    dry = arguments.dry_run
    device = torch.device("cpu" if dry else "cuda")
    if not dry and not torch.cuda.is_available():
        raise ValueError("no CUDA GPU here: --dry-run runs the whole benchmark on a CPU")
    sizes, dtype = (TINY, torch.float32) if dry else (SHAPES, torch.bfloat16)
    problems = [Problem(n, *sizes[n], device, dtype, dry=dry) for n in arguments.shapes]
    record = Record(arguments.out, device, arguments.since, arguments.again, arguments.commit)
    run, broken = Run(record, problems, Monitor(), dry, arguments.again), False
    for name in (name for name in PARTS if name in names):
        record.begin(name, arguments.again, PARTS[name].seconds)
        try:
            with interpreted() if dry else nullcontext():
                PARTS[name].run(run)
        except Exception:  # a mistake of this program: the other parts are worth having
            traceback.print_exc()
            broken = True
        record.end(name)
    run.monitor.stop()
    print(short_table(record), flush=True)
    return FAILED if broken or proof.failures(record) else DONE
