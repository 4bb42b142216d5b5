"""What every contender is given, and what it gives back."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

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
    """Optimisation steps."""

    lr: float | None = None
    """Learning rate, where it is not to be the contender's own."""

    def warmup(self, default: int) -> int:
        """A trainer's default warm-up; a twentieth of the run where that is longer than the run."""
        return default if default < self.steps else self.steps // 20


class Trained(NamedTuple):
    """What a contender makes of a task."""

    code: Callable[[Tensor], tuple[Tensor, Tensor]]
    """Takes tokens to their reconstructions and the numbers of their active latents."""

    lr: float
    """The highest learning rate of the run."""

    warmup: int
    """Steps over which the learning rate rose to it."""
