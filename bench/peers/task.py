"""The interface of all contenders: a task and its stream of batches in, a trained SAE out."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsae.data import ActivationShards
from fastsae.data.ordinary import MAX_NORM_RATIO, SAMPLE_TOKENS, Ordinary
from fastsae.train.probe import planted
from fastsae.train.standardization import Standardization, replace_rows

LONG = 10_000
"""Steps of a run that is only timed; it stops long before."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A run of one contender, passed to its process as JSON."""

    contender: str
    """Its name in the results."""

    tokens: int
    """Tokens per step."""

    d_in: int
    d_sae: int
    k: int

    device: str
    """cpu or cuda."""

    seconds: float | None = None
    """Stop after timing steps for this long."""

    data: str | None = None
    """Directory of activations; None alternates two batches of planted ones."""

    steps: int = LONG
    """Optimization steps."""

    lr: float | None = None
    """Learning rate; None for the contender's default."""

    seed: int = 0
    """Seed of the weights and of the order of the batches."""

    curve: tuple[int, ...] = ()
    """Steps after which the quality is measured during the run."""

    def warmup(self, default: int) -> int:
        """A trainer's default warm-up, at most as long as all contenders may have."""
        return min(default, longest_warmup(self.steps))


def longest_warmup(steps: int) -> int:
    """The limit of a warm-up, 1/20 of the run, fastsae's own default below 20,000 steps."""
    return steps // 20


Code = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Maps tokens to their reconstructions and a mask [N, d_sae] of their active latents."""


def code_of(sae: Any) -> Code:
    """The Code of an SAE with encode and decode; its codes may be sparse."""

    def code(x: Tensor) -> tuple[Tensor, Tensor]:
        codes = sae.encode(x)
        return sae.decode(codes), codes.to_dense() != 0

    return code


class Trained(NamedTuple):
    """The result of a training run."""

    code: Code

    lr: float
    """Peak learning rate."""

    warmup: int
    """Warm-up steps."""


class TimeUp(Exception):
    """Ends a trainer's loop from inside, after enough timed steps."""


class Stream:
    """Yields batches and records the time of each: a step lasts from one batch to the next.

    So a step includes everything that the library's own training loop does, and no loop has to be
    rewritten to be timed. The first step is for warm-up and does not count. At the steps of a
    task's curve, `at_step` measures the SAE being trained, which does not count as time either.
    """

    def __init__(self, sample: Tensor, batches: Iterator[Tensor], task: Task):
        self.sample = sample
        """[n, d_in]: tokens to initialize from."""
        self.code: Callable[[], Code] | None = None
        """Set by the trainer: returns the Code of the SAE as it is now."""
        self.at_step: Callable[[int, Code], object] | None = None
        """Called with the number of steps taken and the SAE's Code."""
        self._batches, self._device, self._seconds = batches, task.device, task.seconds
        self._curve, self._paused = frozenset(task.curve), 0.0
        self._ticks: list[float] = []

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Tensor:
        if self._device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self._ticks.append(now - self._paused)
        timed = self._ticks[-1] - self._ticks[:2][-1]
        if self._seconds is not None and timed >= self._seconds:
            raise TimeUp
        taken = len(self._ticks) - 1
        if taken in self._curve and self.at_step is not None:
            assert self.code is not None, "set by every trainer"
            self.at_step(taken, self.code())
            self._paused += time.perf_counter() - now
        return next(self._batches)

    def step_ms(self) -> list[float]:
        """Duration of each timed step."""
        return [(end - start) * 1e3 for start, end in pairwise(self._ticks[1:])]


def open_stream(task: Task) -> Stream:
    """A task's batches on its device, standardized as fastsae does, for every library alike."""
    if task.data is None:
        rows = planted(2 * task.tokens + SAMPLE_TOKENS, task.d_in)
        pair = rows[SAMPLE_TOKENS:].to(task.device).split(task.tokens)
        return Stream(rows[:SAMPLE_TOKENS], cycle(pair), task)
    shards = ActivationShards(task.data)
    standardized = standardization_of(shards)
    batches = shards.batches(task.tokens, task.seed)
    stream = (standardized(batch.x.to(task.device)) for batch in batches)
    return Stream(standardized(shards.sample(SAMPLE_TOKENS)), stream, task)


def standardization_of(shards: ActivationShards) -> Callable[[Tensor], Tensor]:
    """Centers and scales activations in place, and replaces those of extreme norm."""
    units = Standardization.of([Ordinary.of(shards.sample(SAMPLE_TOKENS), MAX_NORM_RATIO)])

    def standardized(x: Tensor) -> Tensor:
        return replace_rows(units(x), units.ordinary(x))

    return standardized
