"""Full GPU benchmark: precompile, floors, core tests, training steps, kernels, all tests, peers.

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
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from bench.kernels import line as kernel_line
from bench.kernels import op_row
from bench.ops import OPS
from bench.problem import SHAPES, TINY, Problem
from bench.record import ROOT, Record
from bench.roofs import copy_row, product_row, roofs_from, square
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

    def row(self, part: str, key: str, work: Callable[[], dict[str, Any]], **more: float) -> None:
        """Measure and show a row, with the clocks at which it ran."""

        def watched() -> dict[str, Any]:
            start = time.time()
            return work() | self.monitor.since(start)

        row = self.record.row(part, key, watched, **more)
        self.record.say(f"{key:20} " + ", ".join(f"{name} {value}" for name, value in row.items()))


def compile_kernels(run: Run) -> None:
    major, minor = (9, 0) if run.dry else torch.cuda.get_device_capability()
    names = "".join(p.name for p in run.problems)
    run.row(
        "compile", "triton", partial(precompile, 10 * major + minor, names, run.dry), patience=1e9
    )


def measure_floors(run: Run) -> None:
    """Short bursts, and for copy and GEMM two seconds back to back, as hot as a step runs."""
    p = run.problems[0]
    held = {"budget": 2000.0, "space": False}
    rows: dict[str, Callable[[], dict[str, Any]]] = {"copy": partial(copy_row, p)}
    for kind in ("bf16", "fp8", "tf32", "fp32"):
        rows[f"{kind} square"] = partial(product_row, square(p), kind)
    rows["copy for 2 s"] = partial(copy_row, p, **held)
    rows["bf16 square for 2 s"] = partial(product_row, square(p), "bf16", **held)
    for q in run.problems:
        for kind in ("bf16", "fp8", "linear"):
            rows[f"{kind} {q.name}"] = partial(product_row, q, kind)
    for name, work in rows.items():
        run.row("floors", name, work)


def run_tests(run: Run, part: str) -> None:
    proof.run_tests(run.record, part, run.dry)


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
    here = [name for name in ("sae_lens", "sparsify", "dictionary_learning") if find_spec(name)]
    command = [sys.executable, "-m", "bench", "peers", "--rounds", "1", "--steps", "0"]
    command += ["--shapes", *(p.name for p in run.problems)]

    def race() -> dict[str, Any]:
        if run.dry or not here:
            return {"skipped": f"installed: {', '.join(here) or 'none'}"}
        limit = max(1, run.record.left("peers"))
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
        return {"output": done.stdout[-8000:], "code": done.returncode}

    run.row("peers", "race", race, patience=1e9)


class Part(NamedTuple):
    run: Callable[[Run], None]
    seconds: float
    """After which it begins no row."""


PARTS = {
    "compile": Part(compile_kernels, 60),
    "floors": Part(measure_floors, 45),
    "core tests": Part(partial(run_tests, part="core tests"), 60),
    "step": Part(time_steps, 150),
    "kernels": Part(time_kernels, 100),
    "tests": Part(partial(run_tests, part="tests"), 120),
    "peers": Part(race_peers, 60),
}
"""In order; all of it ends with record.LAST."""


def bench(arguments: argparse.Namespace) -> int:
    names = arguments.parts or [*PARTS]
    if unknown := set(names) - PARTS.keys():
        raise ValueError(f"parts are {', '.join(PARTS)}: got {', '.join(sorted(unknown))}")
    dry, again = arguments.dry_run, arguments.again
    if not dry and not torch.cuda.is_available():
        raise ValueError("no CUDA GPU here: --dry-run runs the whole benchmark on a CPU")
    device = torch.device("cpu" if dry else "cuda")
    sizes, dtype = (TINY, torch.float32) if dry else (SHAPES, torch.bfloat16)
    problems = [Problem(n, *sizes[n], device, dtype, dry=dry) for n in arguments.shapes]
    record = Record(arguments.out, device, arguments.since, again, arguments.commit)
    run, broken = Run(record, problems, Monitor(), dry, again), False
    for name in (name for name in PARTS if name in names):
        record.begin(name, again, PARTS[name].seconds)
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
