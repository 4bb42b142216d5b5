"""The step table: a whole training step, against dense PyTorch and against the floor.

The floor is the encoder's product in bf16, as cuBLAS does it here, and reading and writing what
Adam must. A step is everything that a trainer's is, with the count of which latents fired.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.dense import DenseTopK, dense_adam, dense_step
from fastsae import SAE, TopK
from fastsae.losses import Objective
from fastsae.train.optim import Adam, Optimizer
from fastsae.train.step import fused_step
from fastsae_kernels import decode

from .checks import STEP_GROUPS
from .clock import (
    NO_ROOM,
    Floors,
    Stopwatch,
    attempt,
    floors_from,
    free,
    peak_bytes,
    shown,
    synchronize,
    timed,
    times,
)
from .data import Problem
from .record import Record

GOALS = {"A": 17.0, "B": 2.7, "C": 2.0, "D": 62.0}
"""Milliseconds on an H200."""

RATIO = 3.5
"""How many times as long dense PyTorch is to take."""

ROUNDS = 5
LR = 1e-5


class Contender(NamedTuple):
    """A row of the table."""

    options: dict[str, Any] | None
    """Of our Adam; None for dense PyTorch."""
    dead: bool = False
    """Whether 5 % of the latents are dead, so that aux-k runs."""


CONTENDERS = {
    "fastsae": Contender({}),
    "fastsae, bf16 moments, window 8": Contender({"adam_moments": "bf16", "adam_window": 8}),
    "dense": Contender(None),
    "fastsae, 5 % dead": Contender({}, dead=True),
    "dense, 5 % dead": Contender(None, dead=True),
}


def contenders(p: Problem) -> dict[str, Contender]:
    return {name: one for name, one in CONTENDERS.items() if p.name == "B" or not one.dead}


def empty_sae(p: Problem) -> SAE:
    """Tied unit rows, made on the device without a copy."""
    with torch.device("meta"):
        sae = SAE(p.D, p.F, TopK(p.K))
    sae = sae.to_empty(device=p.device)
    with torch.no_grad():
        sae.W_dec.normal_()
        sae.W_dec.div_(torch.linalg.vector_norm(sae.W_dec, dim=1, keepdim=True))
        sae.W_enc.copy_(sae.W_dec)
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return sae


@torch.no_grad()
def batches(p: Problem, W_dec: Tensor) -> list[tuple[Tensor]]:
    """Data of the dictionary's own rows, so that some latents fire often, and noise."""
    made = []
    for _ in range(2):
        values, indices = p.codes(torch.float32)
        made.append((decode(values, indices, W_dec).add_(p.normal(p.N, p.D), alpha=0.02),))
    return made


Step = Callable[[Tensor], object]


def our_step(p: Problem, sae: SAE, kind: Contender) -> Step:
    adam = Adam(sae, Optimizer(**(kind.options or {})), shadows=("W_enc", "W_dec"))
    dead = torch.arange(0, p.F, 20, device=p.device) if kind.dead else None
    unfired = torch.zeros(p.F, dtype=torch.int64, device=p.device)

    def step(x: Tensor) -> None:
        adam.begin_step(LR)
        result = fused_step(sae, adam, x, dead, Objective())
        unfired.add_(len(x)).masked_fill_(result.codes.fired(), 0)

    return step


def their_step(p: Problem, sae: SAE, kind: Contender) -> Step:
    model = DenseTopK(sae)
    adam = dense_adam(model, LR)
    dead = torch.arange(p.F, device=p.device) % 20 == 0 if kind.dead else None
    unfired = torch.zeros(p.F, dtype=torch.int64, device=p.device)

    def step(x: Tensor) -> None:
        _, fired = dense_step(model, adam, x, dead, p.D // 2, low=True)
        unfired.add_(len(x)).masked_fill_(fired, 0)

    return step


class Ready(NamedTuple):
    """A step that has been taken a few times, its data, and its memory at rest and at its peak."""

    step: Step
    data: list[tuple[Tensor]]
    peak: int


def prepared(p: Problem, kind: Contender) -> Ready:
    torch.manual_seed(0)
    cuda = p.device.type == "cuda"
    free()
    before = torch.cuda.memory_allocated() if cuda else 0
    sae = empty_sae(p)
    data = batches(p, sae.W_dec)
    step = (their_step if kind.options is None else our_step)(p, sae, kind)
    del sae
    for x in data[: 1 if p.rehearsal else 2]:
        step(*x)
    synchronize(p.device)
    free()
    at_rest = torch.cuda.memory_allocated() - before if cuda else 0
    return Ready(step, data, at_rest + peak_bytes(lambda: step(*data[0]), p.device))


def resident(p: Problem, kind: Contender) -> float:
    """About how many bytes a row needs: its weights and optimizer, and what a step adds."""
    parameters = 2 * p.F * p.D
    if kind.options is None:
        return parameters * 22 + 12.0 * p.N * p.F
    return parameters * (14 if not kind.options else 10) + (3 << 30)


def free_bytes(p: Problem) -> float:
    return math.inf if p.rehearsal else torch.cuda.mem_get_info()[0]


def too_large(p: Problem, kind: Contender) -> str:
    """Why a row is not tried, if it is not."""
    needed, there = resident(p, kind), free_bytes(p)
    return "" if needed < there else f"needs {needed / 1e9:.0f} GB, {there / 1e9:.0f} GB are free"


def run_rounds(p: Problem, ready: dict[str, Ready]) -> dict[str, list[Stopwatch]]:
    """Single steps, in turns."""
    taken: dict[str, list[Stopwatch]] = {name: [] for name in ready}
    calls = dict.fromkeys(ready, 1)
    for counted in [True] if p.rehearsal else [False] + [True] * ROUNDS:
        for name, (step, data, _) in ready.items():
            took = timed(step, data, p, calls[name], False)
            if counted:
                taken[name] += took
            else:
                calls[name] = max(2, min(40, round(150 / took[0].ms())))
    return taken


def shape_rows(p: Problem) -> dict[str, Any]:
    """All rows of a shape; in turns where they fit into memory together, else one by one."""
    free()
    reasons = {name: too_large(p, kind) for name, kind in contenders(p).items()}
    found = {name: {"error": reason} for name, reason in reasons.items() if reason}
    wanted = {name: kind for name, kind in contenders(p).items() if name not in found}
    together = sum(resident(p, kind) for kind in wanted.values()) < 0.85 * free_bytes(p)
    if together:
        taken = group_rows(p, wanted)
        free()
        together = not any(one.get("error") == NO_ROOM for one in taken.values())
        found |= taken
    if not together:
        for name, kind in wanted.items():
            found |= group_rows(p, {name: kind})
            free()
    return {"rows": found, "in turns": together}


def group_rows(p: Problem, group: dict[str, Contender]) -> dict[str, Any]:
    """Rows that are taken in turns."""
    found: dict[str, Any] = dict.fromkeys(group)
    ready: dict[str, Ready] = {}

    def prepare(name: str) -> dict[str, Any]:
        ready[name] = prepared(p, group[name])
        return {}

    for name in group:
        found[name] = attempt(partial(prepare, name))
    outcome = attempt(partial(run_rounds, p, ready))
    for name, one in ready.items():
        found[name] = outcome if "error" in outcome else row(p, outcome[name], one.peak)
    return found


def row(p: Problem, watches: list[Stopwatch], peak: int) -> dict[str, Any]:
    found = times(watches)
    tokens = round(p.N / found["ms"]["median"] * 1e3)
    return found | {"tokens/s": tokens, "peak GB": round(peak / 1e9, 2)}


def floor_ms(p: Problem, kind: Contender, floors: Floors) -> float | None:
    """The encoder's product and Adam's bytes; of rows in a window, those that fire here."""
    product = floors.encoders.get(p.name)
    if product is None:
        return None
    per_parameter, visited = 26, float(p.F)
    if kind.options:
        per_parameter = 18
        busy = int(torch.bincount(p.indices().flatten(), minlength=p.F).count_nonzero())
        visited = busy + (p.F - busy) / 8
    return product + 1e3 * 2 * per_parameter * visited * p.D / floors.bandwidth


def against(p: Problem, found: dict[str, Any], floors: Floors, gpu: str) -> None:
    """Add what each row is compared with."""
    for name, kind in contenders(p).items():
        one = found["rows"][name]
        if "ms" not in one:
            continue
        ms, floor = one["ms"]["median"], floor_ms(p, kind, floors)
        if floor is not None:
            one |= {"floor ms": round(floor, 3), "of floor": round(floor / ms, 3)}
        if kind.options is not None:
            one["H200 goal ms"] = GOALS[p.name]
            if "H200" in gpu:
                one["goal met"] = ms <= GOALS[p.name]
            dense = found["rows"].get("dense, 5 % dead" if kind.dead else "dense", {})
            if "ms" in dense:
                one["dense / ours"] = round(dense["ms"]["median"] / ms, 2)


def line(p: Problem, name: str, one: dict[str, Any]) -> str:
    if "error" in one:
        return f"{p.name} {name:31} {one['error'][:80]}"
    text = f"{p.name} {name:31} {one['ms']['median']:9.3f} ms (host {one['host ms']:.2f})"
    text += f" {shown(one.get('floor ms'), '9.3f')} {shown(one.get('of floor'), '6.1%')}"
    text += f" {one['tokens/s']:9} tokens/s {one['peak GB']:7} GB"
    if "H200 goal ms" in one:
        met = {True: " met", False: " NOT met", None: ""}[one.get("goal met")]
        text += f"  H200 goal {one['H200 goal ms']}{met}"
    if "dense / ours" in one:
        text += f"  dense {one['dense / ours']}x (goal {RATIO})"
    return text


def step_table(record: Record, problems: list[Problem]) -> None:
    floors = floors_from(record.rows("floors"))
    unfit = record.unfit(*STEP_GROUPS)
    for p in problems:
        if unfit:
            found = record.put("step", p.name, {"error": unfit})
        else:
            found = record.row("step", p.name, partial(shape_rows, p))
        if "rows" in found:
            against(p, found, floors, record.stamp["gpu"])
            found = record.put("step", p.name, found)
        for name in contenders(p):
            record.say(line(p, name, found.get("rows", {}).get(name, found)))
