"""Compares what `fastsae train` plans of its memory and time with what it takes.

Each run trains at a shape for some steps on planted activations in a file, in a process of its own,
and leaves both in its summary.json. Columns: planned and measured milliseconds per step, planned
and measured peak memory in MB beyond what the process had before, and the relative errors.

Results go to bench/results/plan-intel.json, or that of another machine.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from fastsae.train.probe import planted

from .clock import significant
from .problem import SHAPES
from .record import machine, markdown, write

ROWS = 131_072
"""Planted activations to train on: each only once or twice, as in long runs."""


COMPARED = (("step_seconds", "ms", 1e3), ("peak_bytes", "MB", 1e-6))
"""What facts have, in which unit."""


def run(shape: str, steps: int, options: list[str], memory: bool) -> dict[str, Any]:
    """Train at a shape; plan and facts, or those of memory alone."""
    N, d, F, k = SHAPES[shape]
    with TemporaryDirectory() as folder:
        data, out = Path(folder) / "acts.npy", Path(folder) / "run"
        np.save(data, planted(ROWS, d).numpy())
        command = [
            *(sys.executable, "-m", "fastsae", "train", "--data", data, "--out", out),
            *("--d-sae", F, "--k", k, "--batch-size", N, "--steps", steps, "--device", "cpu"),
            *("--dead-after", 1 << 40, *options),
        ]
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        subprocess.run([*map(str, command)], check=True, env=environment, capture_output=True)
        facts = json.loads((out / "summary.json").read_text())["facts"]
    row = {}
    for name, unit, scale in COMPARED[memory:]:
        planned, taken = (scale * facts[key] for key in (f"planned_{name}", name))
        row |= {f"planned {unit}": significant(planned), unit: significant(taken)}
        row[f"{unit} error"] = f"{planned / taken - 1:+.1%}"
    return row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, shapes = parser.add_argument, list("abcd")
    add("--shapes", nargs="+", choices=shapes, default=shapes, help="shapes (default: all)")
    add("--steps", type=int, default=40, help="steps of each run (default: 40)")
    text = "compare memory alone: on a busy machine, times mean nothing"
    add("--memory", action="store_true", help=text)
    add("--options", nargs="*", default=[], help="further words for fastsae train, quoted")


def bench(arguments: argparse.Namespace) -> None:
    """Print a table, and write it to the results."""
    options = [word for text in arguments.options for word in text.split()]
    rows = {}
    for shape in arguments.shapes:
        rows[shape] = run(shape, arguments.steps, options, arguments.memory)
        print(shape, rows[shape], flush=True)
    titles = ["shape", *next(iter(rows.values()))]
    print(markdown(titles, [(shape, *row.values()) for shape, row in rows.items()]))
    name = " ".join(["fp32" if not options else "", *options]).strip()
    print(write(f"plan-{machine()}", {name: {"steps": arguments.steps, "rows": rows}}))
