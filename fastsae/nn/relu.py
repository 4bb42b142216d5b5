"""ReLU with an L1 penalty (arXiv:2309.08600), and its annealing to an Lp penalty.

The proximal step of R(z) = lambda |z|_1 for z >= 0, infinite for z < 0, is max(h - lambda, 0); the
shift by lambda is folded into b_enc. Training minimizes the squared error plus l1_coef |z|_1.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fastsae.codes import Codes
from fastsae.shards import ONE_PROCESS, Shards

from .activation import Activation, Inputs, Penalized, Targets, Weights, warmed
from .penalty import Coefficient, L1Config
from .sparse_pre import SparsePre


@dataclass(frozen=True, kw_only=True)
class ReLUConfig(L1Config):
    """ReLU with an L1 sparsity penalty."""

    name = "relu"

    p_end: float = 1.0
    """Exponent of the penalty's norm at the end of training, annealed from 1; below 1 it shrinks
    large activations less (p-annealing, arXiv:2408.00113)."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.p_end <= 1:
            raise ValueError(f"p_end must be above 0 and at most 1, got {self.p_end}")


class ReLU(Activation, config=ReLUConfig):
    """Keeps every positive pre-activation. The arguments are those of ReLUConfig."""

    cfg: ReLUConfig

    def build(self, d_in: int, d_sae: int) -> None:
        self.coefficient = Coefficient(self.cfg.l1_coef, self.cfg.target_l0)
        self.target_l0 = self.coefficient.target_l0

    @property
    def activation_threshold(self) -> float:
        return 0.0

    def encode(self, x: Inputs, weights: Weights) -> Codes:
        found = SparsePre.above(x, weights.W_enc, weights.b_enc, 0.0)
        return found.codes(found.pre)

    def penalized(self, x: Inputs, target: Targets, weights: Weights, progress: float) -> Penalized:
        codes = self.encode(x, weights)
        p = 1 - (1 - self.cfg.p_end) * progress
        norm = lp_norm(codes.values, p, self.shards) / max(len(x), 1)
        penalty = self.coefficient(norm, self.shards.l0(codes))
        return codes, warmed(progress, self.cfg.sparsity_warmup) * penalty

    def after_step(self, codes: Codes) -> None:
        self.coefficient.after_step(self.shards.l0(codes))


def lp_norm(
    values: Float[Tensor, "N K"], p: float, shards: Shards = ONE_PROCESS
) -> Float[Tensor, ""]:
    """Sum of |value|^p, scaled to the sum of |value|: p shifts the penalty from large to small
    values without changing the total."""
    size = values.abs()
    total = shards.total(size.sum())
    if p == 1:
        return total
    power = (size + torch.finfo(values.dtype).eps).pow(p).where(size > 0, 0.0).sum()
    power = shards.total(power)
    return power * (total / power.clamp_min(torch.finfo(values.dtype).tiny)).detach()
