"""The step table: whole training steps, one row per contender, and what each kernel takes of it."""

import time
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.clock import free, measure, peak_bytes, synchronize, timed
from bench.contender import Contender, Step, batches, empty_sae, step_of
from bench.problem import Problem
from bench.record import Record, attempt
from bench.roofs import Cost, Roofs, roofs_from
from fastsae.train import Optimizer

from .monitor import Monitor

SMALL = {"optimizer": Optimizer(adam_moments="bf16", adam_window=8)}
WINDOW = "fastsae, bf16 moments, window 8"
FP8 = "fastsae, fp8 candidates"

CONTENDERS = {
    "fastsae": Contender(),
    WINDOW: Contender(options=SMALL),
    FP8: Contender(options={**SMALL, "encoder_precision": "fp8"}),
    "fastsae, CUDA graph": Contender(options={**SMALL, "cuda_graph": "on"}),
    "fastsae, 512 MB of pre-activations": Contender(
        options=SMALL, patches={"fastsae_kernels._launch._BUFFER_MB": "512"}
    ),
    "dense": Contender("dense"),
    "fastsae, 5 % dead": Contender(dead=True),
    "dense, 5 % dead": Contender("dense", dead=True),
}
"""All but the first two and dense start from the second's options."""

PREDICTED = {
    WINDOW: {"A": 17.6, "B": 2.75, "C": 1.85, "D": 63.0},
    FP8: {"A": 16.0, "D": 50.0},
}
"""Milliseconds on an H200 that we predicted from bytes and FLOPs."""

BUDGET = 1500.0
"""Milliseconds of steps that are timed for a row."""

PROFILED = 3
"""Steps under the profiler."""


def contenders(p: Problem) -> dict[str, Contender]:
    """Those with dead latents at one shape only."""
    return {name: one for name, one in CONTENDERS.items() if p.name == "B" or not one.dead}


def step_rows(record: Record, problems: list[Problem], monitor: Monitor) -> None:
    roofs = roofs_from(record.rows("floors"))
    for p in problems:
        for name, contender in contenders(p).items():
            key = f"{p.name} {name}"
            row = record.row("step", key, partial(step_row, record, key, p, contender, monitor))
            record.put("step", key, compared(row, record, p, name, roofs))
            record.say(line(key, row))
            free()


def step_row(
    record: Record, key: str, p: Problem, contender: Contender, monitor: Monitor
) -> dict[str, Any]:
    """Times of a contender's steps; their profile goes to a part of its own."""
    cuda = p.device.type == "cuda"
    torch.manual_seed(0)
    free()
    before = torch.cuda.memory_allocated() if cuda else 0
    with contender.patched():
        sae = empty_sae(p)
        data = batches(p, sae.W_dec)
        try:
            step = step_of(contender, p, sae)
        except (TypeError, ValueError) as refusal:
            return {"skipped": str(refusal)[:200]}
        del sae
        timed(step, data, p.device, 0 if p.dry else 2, False)
        free()
        at_rest = torch.cuda.memory_allocated() - before if cuda else 0
        peak = 0 if p.dry else peak_bytes(lambda: step(*data[0]), p.device) or 0
        start = time.time()
        row = measure(step, data, p.device, BUDGET, space=False, dry=p.dry)
        row |= {"tokens/s": round(p.N / row["ms"]["median"] * 1e3)}
        row |= {"peak GB": round((at_rest + peak) / 1e9, 2), **monitor.since(start)}
        record.put("step", key, row)  # whatever becomes of the profile
        record.put("profile", key, attempt(partial(profiled, step, data, p)))
    return row


def profiled(step: Step, data: list[tuple], p: Problem) -> dict[str, Any]:
    """Calls and milliseconds of each kernel in a step; of each operator where it is a dry run."""
    cuda, steps = p.device.type == "cuda", 1 if p.dry else PROFILED
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as events:
        for n in range(steps):
            step(*data[n % len(data)])
        synchronize(p.device)
    found = []
    for event in events.key_averages():
        us = event.self_device_time_total if cuda else event.self_cpu_time_total
        if us > 0:
            found.append((us / 1e3 / steps, event.count / steps, event.key[:200]))
    total = sum(ms for ms, *_ in found)
    return {
        name: {"ms": round(ms, 4), "calls": round(calls, 2), "share": round(ms / total, 4)}
        for ms, calls, name in sorted(found, reverse=True)[:40]
    }


def least(p: Problem, contender: Contender, record: Record, roofs: Roofs) -> dict[str, float]:
    """Milliseconds that no step can avoid: the encoder's GEMM as measured, and Adam's bytes."""
    optimizer = contender.options.get("optimizer", Optimizer())
    per_parameter = 26 if optimizer.adam_moments == "fp32" else 18
    busy = int(torch.bincount(p.indices().flatten(), minlength=p.F).count_nonzero())
    visited = busy + (p.F - busy) / optimizer.adam_window
    adam = roofs.ms(Cost(2 * per_parameter * visited * p.D))
    gemm = record.rows("floors").get(f"bf16 {p.name}", {}).get("ms", {}).get("median", 0.0)
    return {"GEMM": gemm, "Adam": adam}


def compared(
    row: dict[str, Any], record: Record, p: Problem, name: str, roofs: Roofs
) -> dict[str, Any]:
    """A row with what it is compared with."""
    if "ms" not in row:
        return row
    contender, ms = CONTENDERS[name], row["ms"]["median"]
    floor = sum(least(p, contender, record, roofs).values())
    row |= {"floor ms": round(floor, 3), "of floor": round(floor / ms, 3)}
    if p.name in PREDICTED.get(name, {}):
        row["predicted ms (H200)"] = PREDICTED[name][p.name]
    return row


def line(key: str, row: dict[str, Any]) -> str:
    if "ms" not in row:
        return f"{key:40} {(row.get('error') or 'skipped: ' + row['skipped'])[:80]}"
    text = f"{key:40} {row['ms']['median']:9.3f} ms (host {row['host ms']:.2f})"
    text += f"{row['floor ms']:9.3f} {row['of floor']:6.1%} {row['tokens/s']:9} tokens/s"
    text += f" {row['peak GB']:6} GB"
    if "SM MHz" in row:
        text += f" {row['SM MHz']:.0f} MHz {row['W']:.0f} W"
    if "predicted ms (H200)" in row:
        text += f"  predicted {row['predicted ms (H200)']}"
    return text + ("  UNVERIFIED" if "unverified" in row else "")


def profile_lines(record: Record, key: str, most: int) -> list[str]:
    """The kernels that take the most of a step."""
    found = record.rows("profile").get(key, {})
    if "error" in found:
        return [f"  {key}: no profile, {found['error'][:80]}"]
    return [
        f"  {one['share']:6.1%} {one['ms']:8.3f} ms {one['calls']:6.1f} x {name[:60]}"
        for name, one in list(found.items())[:most]
    ]
