"""Penalties on how much a code says: their coefficient, fixed or steered towards an L0."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .activation import ActivationConfig

FIRST, GAIN, REACH = 0.03, 0.02, 2.0
"""The coefficient that steering starts from, how fast it goes, and the logarithm of how many times
too large or small an L0 counts as at most (our choice)."""

TARGET_L0 = 32.0
"""Where neither a coefficient nor a target is given."""


class Coefficient(nn.Module):
    """The coefficient of a penalty: fixed, or steered towards an L0 from where it starts.

    When steered, the price also rises and falls with (L0 / target)^2, at once; the coefficient,
    multiplied after each step by (L0 / target)^GAIN, makes up for what remains. L0 follows a price
    slowly: by a coefficient alone it would swing around its target.
    """

    value: Float[Tensor, ""]

    def __init__(self, value: float | None, target_l0: float | None):
        super().__init__()
        self.target_l0 = TARGET_L0 if value is None and target_l0 is None else target_l0
        start = value if self.target_l0 is None else value or FIRST
        self.register_buffer("value", torch.tensor(float(start or 0.0)))

    def forward(self, norm: Float[Tensor, ""], l0: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """The price of a norm of a training batch's codes, of which L0 is taken note."""
        if self.target_l0 is None:
            return self.value * norm
        with torch.no_grad():
            excess = (l0.to(self.value) / self.target_l0).log().clamp(-REACH, REACH)
            price = self.value * (2 * excess).exp()
            if self.training:
                self.value.mul_((GAIN * excess).exp())
        return price * norm


def check_penalty(value: float | None, target_l0: float | None, name: str) -> None:
    """ValueError for a coefficient or an L0 to reach that cannot be."""
    if value is not None and not value >= 0:
        raise ValueError(f"{name} must be at least 0, got {value}")
    if target_l0 is not None and not target_l0 > 0:
        raise ValueError(f"target_l0 must be above 0, got {target_l0}")


def check_warmup(warmup: float) -> None:
    if not 0 <= warmup <= 1:
        raise ValueError(f"sparsity_warmup must be between 0 and 1, got {warmup}")


@dataclass(frozen=True, kw_only=True)
class L1Config(ActivationConfig):
    """Settings of activations with an L1 penalty."""

    l1_coef: float | None = None
    """L1 coefficient, relative to the squared error per token."""

    target_l0: float | None = None
    """Target L0. If set, the coefficient is adapted to reach it (default: 32 when no coefficient is
    given)."""

    sparsity_warmup: float = 0.1
    """Fraction of training over which the sparsity coefficient warms up."""

    def __post_init__(self):
        check_penalty(self.l1_coef, self.target_l0, "l1_coef")
        check_warmup(self.sparsity_warmup)
