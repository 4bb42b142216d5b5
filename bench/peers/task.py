"""What every contender is given, a task and its batches, and what it gives back."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsae.data import ActivationShards
from fastsae.train.trainer import SAMPLE_TOKENS

LONG = 10_000
"""Steps of the run that timed steps belong to: more than anybody waits for."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A run for one contender in a process of its own, which gets it as JSON."""

    contender: str
    """Its name in the race."""

    tokens: int
    """Tokens per step."""

    d_in: int
    d_sae: int
    k: int

    device: str
    """cpu or cuda."""

    seconds: float | None = None
    """Stop once steps have been timed for so long."""

    data: str | None = None
    """A folder of activations; without it, two batches of Gaussian random numbers in turn."""

    steps: int = LONG
    """Optimization steps."""

    lr: float | None = None
    """Learning rate, where it is not to be the contender's own."""

    def warmup(self, default: int) -> int:
        """A trainer's default warm-up; a twentieth of the run where that is longer than the run."""
        return default if default < self.steps else self.steps // 20


Code = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Takes tokens to their reconstructions and a mask [N, d_sae] of their active latents."""


def code_of(sae: Any) -> Code:
    """Of an SAE with encode and decode, whose codes may be sparse."""

    def code(x: Tensor) -> tuple[Tensor, Tensor]:
        codes = sae.encode(x)
        return sae.decode(codes), codes.to_dense() != 0

    return code


class Trained(NamedTuple):
    """What a contender makes of a task."""

    code: Code

    lr: float
    """The highest learning rate of the run."""

    warmup: int
    """Steps over which the learning rate rose to it."""


class TimeUp(Exception):
    """Ends a trainer's loop from within, once its steps have been timed for long enough."""


class Stream:
    """Hands out batches and reads the clock at each: a step lasts from one batch to the next.

    So a step is all that a library's own training loop does for it, and no loop needs to be
    rewritten to be timed. The first step warms up and does not count.
    """

    def __init__(self, sample: Tensor, batches: Iterator[Tensor], task: Task):
        self.sample = sample
        """[some, d_in]: tokens to initialize from."""
        self._batches, self._device, self._seconds = batches, task.device, task.seconds
        self._ticks: list[float] = []

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Tensor:
        if self._device == "cuda":
            torch.cuda.synchronize()
        self._ticks.append(time.perf_counter())
        timed = self._ticks[-1] - self._ticks[:2][-1]
        if self._seconds is not None and timed >= self._seconds:
            raise TimeUp
        return next(self._batches)

    def step_ms(self) -> list[float]:
        """Of each timed step."""
        return [(end - start) * 1e3 for start, end in pairwise(self._ticks[1:])]


def open_stream(task: Task) -> Stream:
    """A task's batches on its device, scaled to a mean square of 1."""
    if task.data is None:
        generator = torch.Generator().manual_seed(0)
        sample = torch.randn(SAMPLE_TOKENS, task.d_in, generator=generator)
        pair = torch.randn(2, task.tokens, task.d_in, generator=generator).to(task.device)
        return Stream(sample, cycle(pair), task)
    shards = ActivationShards(task.data)
    scale = scale_of(shards)
    batches = (batch.x.to(task.device) * scale for batch in shards.batches(task.tokens))
    return Stream(shards.sample(SAMPLE_TOKENS) * scale, batches, task)


def scale_of(shards: ActivationShards) -> float:
    """What activations are multiplied by, for a mean square of 1."""
    return shards.mean_square**-0.5
