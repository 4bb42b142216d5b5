"""Compiles all kernels in parallel before anything is timed.

    python -m bench.gpu.precompile ARCH SHAPES [--dry-run]

calls every op and every step with meta tensors, records what Triton would compile, and compiles it
with one process per core. Triton stores the kernels in its cache on disk, where the real launches
find them under the same key. Needs a process without TRITON_INTERPRET.
"""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from triton.backends.nvidia import driver as cuda

from bench.contender import random_sae, step_of
from bench.ops import OPS
from bench.problem import SHAPES, Problem
from bench.record import ROOT

from .step import contenders


def recorded(arch: int, names: str) -> tuple[list[Any], list[str]]:
    """All distinct launches, and what could not be recorded: ops that read values on the host."""
    sys.path.append(str(ROOT / "tests" / "compile"))
    from recorder import recording  # pyright: ignore[reportMissingImports]

    launches, problems = [], []
    for p in (Problem(name, *SHAPES[name], torch.device("meta")) for name in names):
        ours = {name: c for name, c in contenders(p).items() if c.trainer == "fastsae"}
        x = torch.empty(p.N, p.D, device=p.device)
        calls = {n: partial(lambda c, p, x: step_of(c, p, random_sae(p))(x), c, p, x)
                 for n, c in ours.items()}  # fmt: skip
        calls |= {op.name: partial(lambda op, p: op.run(*op.make(p)), op, p) for op in OPS}
        for name, call in calls.items():
            with recording(arch, name, p.name) as found:
                try:
                    call()
                except Exception as problem:  # the launches before it are still recorded
                    problems.append(f"{p.name} {name}: {str(problem)[:80]}")
            launches += [launch for launch in found if launch not in launches]
    return launches, problems


def compile_error(launch: Any, launcher: bool) -> str:
    """Compile a launch; returns its error, if any.

    Before 3.7, Triton also builds a launcher for each signature with a C compiler, which needs the
    driver.
    """
    try:
        kernel = launch.compile()
        if launcher and hasattr(cuda, "make_launcher"):
            cuda.CudaLauncher(kernel.src, kernel.metadata)
    except Exception as problem:  # reported, so that the other launches still compile
        return f"{launch.kernel}: {str(problem)[-100:]}"
    return ""


def main() -> None:
    """Record and compile all launches, and print a summary as JSON."""
    arch, names, *dry = sys.argv[1:]
    start, workers = time.time(), len(os.sched_getaffinity(0))
    launches, problems = recorded(int(arch), names)
    # Forked, so that workers need not import torch again; no thread has been started yet.
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
        work = partial(compile_error, launcher=not dry)
        errors = [e for e in pool.map(work, launches[:1] if dry else launches) if e]
    found = {"launches": len(launches), "seconds": round(time.time() - start, 1)}
    print(json.dumps({**found, "not recorded": problems, "not compiled": errors}))


def precompile(arch: int, names: str, dry: bool) -> dict[str, Any]:
    """Run `main` in its own process; returns what it prints."""
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bench.gpu.precompile", str(arch), names, *["--dry-run"] * dry]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines()
    return {"error": lines[-1][:300]} if done.returncode else json.loads(lines[-1])


if __name__ == "__main__":
    main()
