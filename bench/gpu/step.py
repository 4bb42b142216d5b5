"""Times full training steps on the GPU, one row per contender, and profiles their kernels."""

import time
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.clock import free, measure, peak_bytes, synchronize, timed
from bench.contender import Contender, Step, batches, random_sae, step_of
from bench.ops import adam_bytes
from bench.problem import Problem
from bench.record import Record, attempt
from bench.roofs import Cost, Roofs, roofs_from
from fastsae.train import Optimizer

from .monitor import Monitor

SMALL = {"encoder_precision": "bf16", "optimizer": Optimizer(adam_moments="bf16", adam_window=8)}
WINDOW = "fastsae, bf16 moments, window 8"

CONTENDERS = {
    "fastsae": Contender(),
    WINDOW: Contender(options=SMALL),
    "fastsae, fp8 candidates": Contender(options={**SMALL, "encoder_precision": "fp8"}),
    "fastsae, CUDA graph": Contender(options={**SMALL, "cuda_graph": "on"}),
    "fastsae, 512 MB of pre-activations": Contender(options=SMALL, buffer_mb=512),
    "dense": Contender("dense"),
    "fastsae, 5 % dead": Contender(dead=True),
    "dense, 5 % dead": Contender("dense", dead=True),
}
"""Those from WINDOW to dense build on WINDOW's options."""

BUDGET = 1500.0
"""Milliseconds of timed steps per row."""


def contenders(p: Problem) -> dict[str, Contender]:
    """Contenders at a shape: those with dead latents run at B only."""
    return {name: one for name, one in CONTENDERS.items() if p.name == "B" or not one.dead}


def step_rows(record: Record, problems: list[Problem], monitor: Monitor) -> None:
    """Measure and print the row of every contender at every shape."""
    roofs = roofs_from(record.rows("floors"))
    for p in problems:
        for name in contenders(p):
            key = f"{p.name} {name}"
            row = record.row("step", key, partial(step_row, record, key, p, name, monitor))
            if "ms" in row:
                floor = floor_ms(p, CONTENDERS[name], record, roofs)
                row |= {"floor ms": round(floor, 3), "of floor": floor / row["ms"]["median"]}
            record.log(line(key, record.put("step", key, row)))
            free()


def step_row(record: Record, key: str, p: Problem, name: str, monitor: Monitor) -> dict[str, Any]:
    """Step time, throughput and peak memory of a contender; its profile is a separate part."""
    cuda, contender = p.device.type == "cuda", CONTENDERS[name]
    torch.manual_seed(0)
    free()
    before = torch.cuda.memory_allocated() if cuda else 0
    sae = random_sae(p)
    data = batches(p, sae.W_dec)
    try:
        step = step_of(contender, p, sae)
    except (TypeError, ValueError) as refusal:
        return {"skipped": str(refusal)[:200]}
    del sae
    peak = 0
    if cuda:
        timed(step, data, p.device, 2, False)
        free()
        peak = torch.cuda.memory_allocated() - before
        peak += peak_bytes(lambda: step(*data[0]), p.device) or 0
    start = time.time()
    row = measure(step, data, p.device, BUDGET, space=False, dry=p.dry)
    row |= {"tokens/s": round(p.N / row["ms"]["median"] * 1e3), **monitor.since(start)}
    row["peak GB"] = round(peak / 1e9, 2)
    record.put("step", key, row)  # before profiling, which may fail
    record.put("profile", key, attempt(partial(profiled, step, data, p)))
    return row


def profiled(step: Step, data: list[tuple], p: Problem) -> dict[str, Any]:
    """Calls and milliseconds per step of each kernel (in a dry run, of each operator)."""
    kind, steps = (ProfilerActivity.CPU, 1) if p.dry else (ProfilerActivity.CUDA, 3)
    with profile(activities=[kind]) as events:
        for n in range(steps):
            step(*data[n % 2])
        synchronize(p.device)
    us, rows = "self_cpu_time_total" if p.dry else "self_device_time_total", events.key_averages()
    found = [(getattr(row, us) / 1e3 / steps, row.count / steps, row.key) for row in rows]
    total = sum(ms for ms, *_ in found)
    return {
        name[:200]: {"ms": round(ms, 4), "calls": round(calls, 2), "share": round(ms / total, 4)}
        for ms, calls, name in sorted(found, reverse=True)[:40]
        if ms
    }


def floor_ms(p: Problem, contender: Contender, record: Record, roofs: Roofs) -> float:
    """What no step can avoid: the encoder GEMM in bf16, as measured, and Adam's memory traffic."""
    optimizer = contender.options.get("optimizer", Optimizer())
    item = 2 if optimizer.adam_moments == "bf16" else 4
    moments = item + (item if optimizer.adam_second == "entry" else 0)
    busy = int(torch.bincount(p.indices().flatten(), minlength=p.F).count_nonzero())
    visited = busy + (p.F - busy) / optimizer.adam_window
    gemm = record.rows("floors").get(f"bf16 {p.name}", {}).get("ms", {}).get("median", 0.0)
    return gemm + roofs.ms(Cost(2 * adam_bytes(moments) * visited * p.D))


def line(key: str, row: dict[str, Any]) -> str:
    """A row as one line of text."""
    if "ms" not in row:
        return f"{key:40} {row.get('error') or 'skipped: ' + row['skipped']}"[:130]
    text = f"{key:40} {row['ms']['median']:9.3f} ms (host {row['host ms']:.2f})"
    if row.get("floor ms"):
        text += f" floor {row['floor ms']:.3f} {row['of floor']:6.1%}"
    text += f" {row['tokens/s']:9} tokens/s {row['peak GB']:6} GB{clocks(row)}"
    return text + "  UNVERIFIED" * ("unverified" in row)


def clocks(row: dict[str, Any]) -> str:
    return f" {row['SM MHz']:.0f} MHz {row['W']:.0f} W" if "SM MHz" in row else ""


def profile_lines(record: Record, key: str, most: int) -> list[str]:
    """The kernels that take the most time in a step."""
    found = record.rows("profile")[key]
    return [
        f"  {one['share']:6.1%} {one['ms']:8.3f} ms {one['calls']:6.1f} x {name[:60]}"
        for name, one in list(found.items())[:most]
        if name != "error"
    ]
