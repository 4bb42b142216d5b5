"""The same batches for every contender, and the clock that they carry."""

import time
from collections.abc import Iterator
from itertools import cycle, pairwise

import torch
from torch import Tensor

from fastsae.data import ActivationShards
from fastsae.train.trainer import SAMPLE_TOKENS

from .task import Task


class TimeUp(Exception):
    """Ends a trainer's loop from within, once its steps have been timed for long enough."""


class Stream:
    """Hands out batches and reads the clock at each: a step lasts from one batch to the next.

    So a step is all that a library's own training loop does for it, and no loop needs to be
    rewritten to be timed. The first step warms up and does not count.
    """

    def __init__(self, sample: Tensor, batches: Iterator[Tensor], task: Task):
        self.sample = sample
        """[some, d_in]: tokens to initialise from."""
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
