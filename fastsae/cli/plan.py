"""fastsae plan: what a run will need, before it starts."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fastsae.data import ActivationShards, open_path
from fastsae.data.demo import DEMO_TOKENS, DEMO_WIDTH
from fastsae.data.shards import WINDOW_BYTES
from fastsae.distributed import Axes
from fastsae.distributed.launch import named_axes
from fastsae.estimate import (
    LOWER_BOUND,
    PRICED,
    Forecast,
    Gpu,
    Machine,
    advice,
    duration,
    forecast,
    gigabytes,
    gpu_named,
    milliseconds,
    refusal,
)
from fastsae.train import TrainConfig
from fastsae.train.forecast import this_machine, timed, window_bytes, workload_of
from fastsae.train.plan import Plan, precision_on
from fastsae.train.probe import PROBED_STEPS, probe

from . import show
from .parse import filled, read_words, training_start


@dataclass(frozen=True, kw_only=True)
class PlanRun:
    """Predict the memory, disk space, time and cost of a training run.

    It takes the options of `fastsae train`, and needs neither data nor a GPU. Exit code 2: the run
    does not fit into memory. The time of a model (--model) and of dead latents' aux-k loss is not
    included. Numbers for a GPU are estimates: no step has been timed on one yet.
    """

    activation: str = "topk"
    """Activation, as in `fastsae train`."""

    recipe: str | None = None
    """Settings of another trainer, as in `fastsae train`."""

    d_in: int | None = None
    """Width of the activations (default: that of --data, or of the demo's)."""

    d_out: int | None = None
    """Width of the targets of a transcoder (default: d_in)."""

    tokens: int | None = None
    """Tokens of the data, which determine the default number of steps (default: those of --data, or
    of the demo's)."""

    gpu: str | None = None
    """Plan for this GPU: b200, h200, h100, a100-80, a100-40, l40s, l4, or rtx4090 (default: this
    machine)."""

    mesh: str | None = None
    """Plan for many processes, each with a GPU of its own, such as data=2,latent=8."""

    price: float | None = None
    """US dollars per hour of one GPU, or of this machine (default: an example for --gpu)."""

    probe: bool = False
    """Measure 20 steps of the run on this machine, on planted activations, instead of estimating
    their time."""

    config: TrainConfig = field(default_factory=TrainConfig)
    """Run."""

    def __post_init__(self):
        for name in ("d_in", "d_out", "tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.d_out is not None and self.config.target is None:
            raise ValueError("--d-out is the width of a transcoder's targets: give --target too")
        if self.price is not None and self.price < 0:
            raise ValueError(f"price must be at least 0, got {self.price}")
        if self.probe and (self.gpu is not None or self.mesh is not None):
            raise ValueError("--probe measures this machine alone: give neither --gpu nor --mesh")


def resolved(command: PlanRun, d_out: int, tokens: int | None, axes: Axes) -> tuple[Plan, Machine]:
    """What the run resolves to on the machine it is planned for."""
    config = command.config
    gpu = None if command.gpu is None else gpu_named(command.gpu)
    if gpu is None:
        plan = Plan.of(config, d_out, tokens, axes.latent)
        machine = this_machine(plan.device, axes.size if plan.device == "cpu" else 1)
        machine = dataclasses.replace(machine, price=command.price)
    else:
        plan = plan_on(gpu, config, d_out, tokens, axes)
        price = None if command.price is None else command.price * axes.size
        machine = Machine.of_gpu(gpu, axes.size, price)
    return plan, machine


class Data(NamedTuple):
    """What matters of the data, which need not exist."""

    d_in: int
    tokens: int | None
    item_bytes: int = 4
    """Of a number on disk; those of joined sources are in fp32 in memory."""


def main(words: Sequence[str]) -> str:
    given = read_words(words)
    found = planned(filled(PlanRun, given, config=training_start(given)))
    text = "\n".join(table(found))
    if found.fits:
        return text
    show(text)
    raise ValueError(refusal(found))


def planned(command: PlanRun) -> Forecast:
    """The forecast of the run that the command describes."""
    config, data = command.config, data_of(command)
    width = data.d_in * (1 + len(config.layers))
    d_out = (command.d_out or data.d_in) if config.target is not None else width
    axes = Axes() if command.mesh is None else named_axes(command.mesh)
    if config.d_sae % axes.latent or config.batch_size % axes.size:
        raise ValueError(
            f"a mesh of {axes} must divide d_sae = {config.d_sae} by its latent axis and "
            f"batch_size = {config.batch_size} by its processes"
        )
    plan, machine = resolved(command, d_out, data.tokens, axes)
    workload = workload_of(config, plan, width, d_out, axes)
    if not workload.streamed:
        loaded = window_bytes(data.tokens or WINDOW_BYTES, data.item_bytes * workload.row_width)
        workload = dataclasses.replace(workload, loaded=loaded)
    found = forecast(workload, machine)
    if not command.probe or not found.fits:
        return timed(found)
    seconds = probe(config, data.d_in, d_out)
    how = f"measured: {PROBED_STEPS} steps on this machine"
    return dataclasses.replace(found, seconds={"step": seconds}, how=how)


def data_of(command: PlanRun) -> Data:
    """The width and length of the data; ValueError if the width is unknown."""
    config = command.config
    if config.stream is not None and command.d_in is None:
        raise ValueError("with --model, give the width of its activations: --d-in N")
    if config.stream is not None or command.d_in is not None:
        return Data(command.d_in or 0, command.tokens)
    if config.data is None:
        return Data(DEMO_WIDTH, command.tokens or DEMO_TOKENS, 2)
    source = open_path(config.data)
    item_bytes = 4
    if isinstance(source, ActivationShards) and config.target is None and not config.layers:
        item_bytes = source.row_bytes // source.d_in
    return Data(source.d_in, command.tokens or source.n_tokens, item_bytes)


def plan_on(gpu: Gpu, config: TrainConfig, d_out: int, tokens: int | None, axes: Axes) -> Plan:
    """What the run resolves to on a GPU that is not here."""
    precision = precision_on(config, d_out, config.d_sae // axes.latent, fp8=gpu.fp8 > 0)
    here = dataclasses.replace(config, device="cpu", encoder_precision="fp32", cuda_graph="auto")
    plan = Plan.of(here, d_out, tokens, axes.latent)
    return dataclasses.replace(plan, device="cuda", encoder_precision=precision)


def table(f: Forecast) -> Iterator[str]:
    """The forecast in lines."""
    w, machine = f.workload, f.machine
    processes = f", in each of {w.axes.size} processes ({w.axes})" if w.axes.size > 1 else ""
    yield row(
        "run",
        f"{w.latents:,} latents of width {w.d_in:,}, {w.active} active per token; {w.steps:,} "
        f"steps of {w.tokens:,} tokens; {'fused' if w.fused else 'autograd'} step, "
        f"{w.precision} encoder",
    )
    yield row("machine", machine.title + processes)
    yield row(
        "memory",
        gigabytes(f.memory.peak)
        + (f" of {gigabytes(machine.memory)}" if math.isfinite(machine.memory) else "")
        + ": does not fit" * (not f.fits),
    )
    if not w.fused:
        yield part("", LOWER_BOUND)
    for name, size in f.memory.parts.items():
        if size:
            yield part(gigabytes(size), name)
    yield row("disk", gigabytes(sum(f.disk.values())))
    for name, size in f.disk.items():
        if size:
            yield part(gigabytes(size), name)
    yield from times(f)
    yield row("advice", advice(f))


def times(f: Forecast) -> Iterator[str]:
    """Time and cost."""
    w, seconds = f.workload, f.step_seconds
    if seconds is None or f.seconds is None:
        can_probe = f.fits and w.axes.size == 1 and f.machine.here
        hint = ": --probe measures it on this machine" * can_probe
        yield row("time", f"not estimated, as {why_untimed(f)}{hint}")
        return
    yield row("time", f"{milliseconds(seconds)} per step ({f.how})")
    if len(f.seconds) > 1:
        for name, share in sorted(f.seconds.items(), key=lambda item: -item[1]):
            yield part(milliseconds(share), f"{name}  ({share / seconds:.0%})")
    if w.streamed:
        yield part("", "and the time of the model, which produces the activations")
    hours = seconds * w.steps / 3600
    yield row("speed", f"{w.tokens / seconds:,.0f} tokens per second")
    yield row("total", f"{duration(seconds * w.steps)} for {w.tokens * w.steps:,} tokens")
    if f.machine.price is not None:
        rate = f"${f.machine.price:.2f} per hour"
        yield row("cost", f"${hours * f.machine.price:,.2f} at {rate}")
        if f.machine.example:
            yield part("", f"an example price from {PRICED}; set yours with --price")
    if len(f.seconds) > 1:
        yield row("limit", f"{f.limit}: {f.seconds[f.limit or ''] / seconds:.0%} of a step")


def why_untimed(f: Forecast) -> str:
    """Why there is no time."""
    w = f.workload
    if w.streamed:
        return "a model produces the activations"
    if not w.fused:
        return "the autograd step is not modeled"
    if not f.fits:
        return "it does not fit"
    if w.axes.size > 1 and f.machine.here:
        return "a mesh on this machine is not modeled"
    if w.gpu and not w.low_encoder:
        return f"an encoder in {w.precision} is not modeled on a GPU"
    return "this GPU is not in the table"


def row(name: str, text: str) -> str:
    return f"  {name:<9} {text}"


def part(amount: str, text: str) -> str:
    return f"  {'':<9} {amount:>9}  {text}"
