"""Sparsity penalties with a fixed coefficient, or one adapted to reach a target L0."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .activation import ActivationConfig

FIRST, GAIN, REACH = 0.03, 0.02, 2.0
"""Initial coefficient, gain per step, and bound on |log(L0 / target)| (our choice)."""

TARGET_L0 = 32.0
"""The default target, if no coefficient is given either."""


class Coefficient(nn.Module):
    """The coefficient of a penalty: fixed, or adapted to reach a target L0.

    If adapted, it is multiplied by (L0 / target)^GAIN after each step. L0 responds to it slowly and
    would oscillate around the target; so the penalty also has a factor (L0 / target)^2 of the
    current batch, which acts at once.
    """

    value: Float[Tensor, ""]

    def __init__(self, value: float | None, target_l0: float | None):
        super().__init__()
        self.target_l0 = target_of(value, target_l0)
        start = value if self.target_l0 is None else value or FIRST
        self.register_buffer("value", torch.tensor(float(start or 0.0)))

    def forward(self, norm: Float[Tensor, ""], l0: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """The penalty of a batch with this norm and this L0."""
        if self.target_l0 is None:
            return self.value * norm
        return self.value * (2 * self.excess(l0, self.target_l0)).exp() * norm

    @torch.no_grad()
    def excess(self, l0: Float[Tensor, ""], target_l0: float) -> Float[Tensor, ""]:
        """log(L0 / target), bounded."""
        return (l0.to(self.value) / target_l0).log().clamp(-REACH, REACH)

    @torch.no_grad()
    def after_step(self, l0: Float[Tensor, ""]) -> None:
        """Adapt the coefficient to the L0 of a batch."""
        if self.target_l0 is not None:
            self.value.mul_((GAIN * self.excess(l0, self.target_l0)).exp())


def target_of(value: float | None, target_l0: float | None) -> float | None:
    """The target L0, which has a default if there is no coefficient either."""
    return TARGET_L0 if value is None and target_l0 is None else target_l0


def check_penalty(value: float | None, target_l0: float | None, name: str) -> None:
    """ValueError for a negative coefficient, or a target L0 that is not above 0."""
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
        if self.l1_coef == 0 and self.target_l0 is not None:
            raise ValueError(
                f"target_l0 = {self.target_l0} needs l1_coef above 0, or none, to start from: got 0"
            )
        check_warmup(self.sparsity_warmup)
