"""A few steps on data with a planted dictionary, as small and as exact as can be."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import jaxtyping
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastsae import SAE
from fastsae.losses import Objective, TrainingLoss
from fastsae.train.optim import Adam, Optimizer
from fastsae.train.step import autograd_step

N, PLANTED, ACTIVE = 64, 24, 3
PATIENCE = 10
"""Steps after which a latent that has not fired is dead."""


@contextmanager
def small_steps() -> Iterator[None]:
    """On one thread and without a check of every argument's shape, which would take longer."""
    before, threads = jaxtyping.config.jaxtyping_disable, torch.get_num_threads()
    jaxtyping.config.update("jaxtyping_disable", True)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)
        torch.set_num_threads(threads)


class Planted(NamedTuple):
    """Tokens that are sums of a few planted directions, in the input and in the target."""

    inputs: Tensor
    outputs: Tensor
    generator: torch.Generator

    @classmethod
    def for_(cls, sae: SAE) -> "Planted":
        generator = torch.Generator().manual_seed(1)
        sizes = (PLANTED, sae.d_in), (PLANTED, sae.d_out or 0)
        drawn = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
        inputs, outputs = (normalize(rows, dim=1) for rows in drawn)
        return cls(inputs, inputs if sae.d_out is None else outputs, generator)

    def batch(self) -> tuple[Tensor, Tensor]:
        size, generator = (N, PLANTED), self.generator
        rank = torch.rand(size, generator=generator, dtype=torch.float64)
        active = rank <= rank.kthvalue(ACTIVE, dim=1, keepdim=True).values
        values = active * (1 + torch.rand(size, generator=generator, dtype=torch.float64))
        return values @ self.inputs, values @ self.outputs


@torch.no_grad()
def evaluated(sae: SAE) -> float:
    """The FVU of one batch, without noise, and with the threshold that was found on the way."""
    x, y = (t.to(sae.b_dec) for t in Planted.for_(sae).batch())
    variance = (y - y.mean(0)).square().sum()
    error = float((y - sae.eval()(x)).square().sum() / variance)
    sae.train()
    return error


def train(
    sae: SAE, objective: Objective, settings: Optimizer, steps: int, lr: float
) -> list[TrainingLoss]:
    """What each step reports, with the aux-k loss of dead latents."""
    torch.manual_seed(2)  # of activations that draw numbers
    data = Planted.for_(sae)
    adam, silent = Adam(sae, settings), torch.zeros(sae.d_sae)
    results = []
    for step in range(steps):
        x, y = (t.to(sae.b_dec) for t in data.batch())
        adam.begin_step(lr)
        dead = (silent >= PATIENCE).nonzero()[:, 0]
        rest = None if sae.d_out is None else y, (step + 1) / steps
        results.append(autograd_step(sae, adam, x, dead, objective, *rest))
        silent = (silent + 1).masked_fill(results[-1].codes.fired(), 0)
    return results
