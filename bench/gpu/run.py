"""The parts of the GPU benchmark: compile, floors, core tests, training steps, kernels, all tests.

`--dry-run` runs all of them on a CPU at tiny sizes, through Triton's interpreter.
"""

import argparse
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bench import kernels
from bench.ops import OPS
from bench.problem import SHAPES, TINY, Problem, check_names
from bench.record import Record
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
    """The arguments of every part."""

    record: Record
    problems: list[Problem]
    monitor: Monitor
    dry: bool

    def row(self, part: str, key: str, work: Callable[[], dict[str, Any]]) -> None:
        """Measure and print a row, with the GPU's clocks during the measurement."""

        def watched() -> dict[str, Any]:
            start = time.time()
            return work() | self.monitor.since(start)

        row = self.record.row(part, key, watched)
        self.record.log(f"{key:20} " + ", ".join(f"{name} {value}" for name, value in row.items()))


def compile_kernels(run: Run) -> None:
    """Compile all kernels of the shapes that will run."""
    major, minor = (9, 0) if run.dry else torch.cuda.get_device_capability()
    names = "".join(p.name for p in run.problems)
    run.row("compile", "triton", partial(precompile, 10 * major + minor, names, run.dry))


def measure_floors(run: Run) -> None:
    """Measure roofs in short bursts; a copy and a GEMM also for 2 s, as hot as in training."""
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


def time_steps(run: Run) -> None:
    """Time and profile the training steps of all contenders."""
    run.record.begin("profile")
    step_rows(run.record, run.problems, run.monitor)
    proof.mark_rows(run.record)


def time_kernels(run: Run) -> None:
    """Time every op, those of training steps first."""
    roofs = roofs_from(run.record.rows("floors"))
    for op in sorted(OPS, key=lambda op: not op.step):
        for p in run.problems:
            key = f"{p.name} {op.name}"
            work = partial(kernels.op_row, op, p, roofs, False, ("torch",))
            run.record.log(f"{key:34} {kernels.line(run.record.row('kernels', key, work))}")
    proof.mark_rows(run.record)


PARTS: dict[str, tuple[Callable[[Run], None], float]] = {
    "compile": (compile_kernels, 60),
    "floors": (measure_floors, 45),
    "core tests": (lambda run: proof.run_tests(run.record, "core tests", run.dry), 60),
    "step": (time_steps, 150),
    "kernels": (time_kernels, 100),
    "tests": (lambda run: proof.run_tests(run.record, "tests", run.dry), 120),
}
"""In this order, each with the seconds after which it begins no row, at most until record.LAST."""


def bench(arguments: argparse.Namespace) -> int:
    """Run the chosen parts; returns an exit code of guard.py."""
    names = arguments.parts or [*PARTS]
    check_names("parts", names, PARTS)
    dry = arguments.dry_run
    if not dry and not torch.cuda.is_available():
        raise ValueError("no CUDA GPU here: --dry-run runs the whole benchmark on a CPU")
    device = torch.device("cpu" if dry else "cuda")
    sizes, dtype = (TINY, torch.float32) if dry else (SHAPES, torch.bfloat16)
    problems = [Problem(n, *sizes[n], device, dtype, dry=dry) for n in arguments.shapes]
    record = Record(arguments.out, device, arguments.since, arguments.again, arguments.commit)
    run, broken = Run(record, problems, Monitor(), dry), False
    for name in (name for name in PARTS if name in names):
        part, seconds = PARTS[name]
        record.begin(name, seconds)
        try:
            with interpreted() if dry else nullcontext():
                part(run)
        except Exception:  # a bug in one part must not lose the results of the others
            traceback.print_exc()
            broken = True
        record.end(name)
    run.monitor.stop()
    print(short_table(record), flush=True)
    return FAILED if broken or proof.failures(record) else DONE
