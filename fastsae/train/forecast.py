"""What a run is expected to need."""

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from fastsae.data import ActivationShards, ActivationSource, Joined
from fastsae.data.shards import WINDOW_BYTES
from fastsae.distributed import Axes
from fastsae.distributed.launch import place
from fastsae.estimate import (
    LOWER_BOUND,
    Forecast,
    Machine,
    Workload,
    cpu_step_seconds,
    duration,
    forecast,
    gigabytes,
    gpu_like,
    milliseconds,
    refusal,
)
from fastsae.memory import (
    keep_freed_memory,
    memory_left,
    release_freed_memory,
)
from fastsae.nn import ActivationConfig, TopKConfig
from fastsae_kernels import bfloat16_pays

from .config import TrainConfig
from .plan import Plan
from .results import EVALUATION_BATCH

if TYPE_CHECKING:
    from .trainer import Trainer

INDEX_BYTES = 8 * 8
"""Bytes of a row of a window, besides its activations, while it is loaded: eight numbers in int64,
of rows and of their places."""

USUAL_L0 = 32
"""Active latents per token of an activation that neither fixes nor targets their number."""


def active_latents(activation: ActivationConfig, latents: int) -> int:
    """Latents that are active per token: k, or the target L0."""
    known = getattr(activation, "k", None) or getattr(activation, "target_l0", None)
    return max(1, min(round(known or USUAL_L0), latents))


def workload_of(
    config: TrainConfig, plan: Plan, d_in: int, d_out: int, axes: Axes | None = None
) -> Workload:
    """The run, as far as memory and time depend on it, with an SAE of these widths."""
    optimizer, axes = config.optimizer, axes or Axes()
    cpu, activation, proved = plan.device == "cpu", config.activation, False
    if cpu and plan.encoder_precision == "fp32" and isinstance(activation, TopKConfig):
        rows, latents = config.batch_size // axes.data, config.d_sae // axes.latent
        proved = bfloat16_pays(rows, latents, activation.k)
    return Workload(
        tokens=config.batch_size,
        d_in=d_in,
        d_out=d_out,
        row_width=d_in + d_out * (config.target is not None),
        latents=config.d_sae,
        active=active_latents(config.activation, config.d_sae),
        steps=plan.steps,
        evaluated=EVALUATION_BATCH,
        gpu=not cpu,
        fused=plan.step == "fused",
        precision=plan.encoder_precision,
        bf16_candidates=proved,
        low_moments=optimizer.adam_moments == "bf16",
        row_second=optimizer.adam_second == "row",
        window=optimizer.adam_window,
        ema=optimizer.ema is not None,
        auxk=config.objective.auxk_coef > 0 and plan.dead_after < plan.steps * config.batch_size,
        checkpoints=config.keep_checkpoints,
        streamed=config.stream is not None,
        axes=axes,
    )


def loaded_bytes(source: ActivationSource) -> int:
    """Memory that the data take in windows: none if they are in memory already."""
    if isinstance(source, Joined):
        return window_bytes(source.n_tokens, 4 * source.d_in)
    if isinstance(source, ActivationShards):
        return window_bytes(source.n_tokens, source.row_bytes)
    return 0


def window_bytes(tokens: int, row_bytes: int) -> int:
    """A window of stored data, with the numbers of its rows and of their places."""
    return min(tokens, WINDOW_BYTES // row_bytes) * (row_bytes + INDEX_BYTES)


def this_machine(device: str, processes: int = 1) -> Machine:
    """What one of so many processes can get here: of the free memory of the GPU, or of that which
    Linux has left."""
    kind = torch.device(device)
    left = memory_left(device, processes)
    if kind.type == "cpu":
        if left == sys.maxsize // processes:
            left = math.inf
        threads = torch.get_num_threads()
        title = f"this machine ({threads} thread{'s' * (threads != 1)})"
        return Machine(title=title, memory=left, here=True)
    kept = torch.cuda.memory_reserved(kind) - torch.cuda.memory_allocated(kind)
    name = torch.cuda.get_device_name(kind)
    title = f"this GPU ({name})"
    return Machine(title=title, memory=left + kept, gpu=gpu_like(name), here=True)


def forecast_of(trainer: "Trainer") -> Forecast:
    """What a trainer's run needs here."""
    columns, shards = trainer.columns, trainer.shards
    axes = Axes(shards.data, shards.latent)
    widths = columns.width_in, columns.width_out
    workload = workload_of(trainer.config, trainer.plan, *widths, axes)
    workload = replace(workload, loaded=loaded_bytes(trainer.source))
    return forecast(workload, this_machine(trainer.plan.device, place().local_size))


def timed(found: Forecast) -> Forecast:
    """The same with the time of a step: on a CPU measured in about a second, if that is possible;
    on a GPU as predicted.

    Measuring calls `keep_freed_memory`, which lasts to the end of the process."""
    w = found.workload
    if w.gpu or not w.fused or w.streamed or w.axes.size > 1 or not found.fits:
        return found
    keep_freed_memory()  # as the run does: fresh pages would take time
    seconds = cpu_step_seconds(w)
    release_freed_memory()  # the run's own is measured beyond what there is before
    return replace(found, seconds=seconds, how="from this machine's speed")


def check_fits(forecasts: Sequence[Forecast]) -> None:
    """ValueError unless runs that train at the same time all have room for what is certain."""
    *_, last = forecasts
    others = sum(one.memory.kept for one in forecasts) - last.memory.kept
    machine = replace(last.machine, memory=last.machine.memory - others)
    if (whole := replace(last, machine=machine)).cannot_fit:
        raise ValueError(refusal(whole))


def describe_forecast(found: Forecast) -> str:
    """One line for the beginning of a run."""
    memory = gigabytes(found.memory.peak)
    text = f"plan: {memory} of memory, {gigabytes(sum(found.disk.values()))} of disk"
    if found.step_seconds is not None:
        seconds = found.step_seconds
        how = found.how + ", without the model" * found.workload.streamed
        length = duration(seconds * found.workload.steps)
        text += f", {milliseconds(seconds)} per step, {length} ({how})"
    if not found.fits:
        text += f"; only {gigabytes(found.machine.memory)} of memory is free: it may run out"
    return text if found.workload.fused else f"{text}; {LOWER_BOUND}"
