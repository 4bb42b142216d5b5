"""What an activation is: it turns pre-activations into codes, and may ask a price for them."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fastsae.codes import Codes


class Weights(NamedTuple):
    """The parameters of an SAE as one pass over tokens sees them."""

    W_enc: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_out"]
    b_dec: Float[Tensor, " d_out"]


class Pass(NamedTuple):
    """What a batch became on its way through an SAE in training."""

    recon: Float[Tensor, "N d_out"]
    codes: Codes
    penalty: Float[Tensor, ""]
    """The activation's own term of the loss, on average over tokens, with its coefficient: in
    units of a token's squared error, summed over coordinates."""


@dataclass(frozen=True, kw_only=True)
class ActivationConfig:
    """The settings of an activation, as they are saved; `name` is what it is chosen by."""

    name: ClassVar[str]

    @staticmethod
    def named(name: Any) -> "type[ActivationConfig]":
        """The settings of the activation of that name; ValueError lists those there are."""
        from .activations import ACTIVATIONS  # which imports every activation

        if name not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
        return ACTIVATIONS[name][1]


class Activation(nn.Module, ABC):
    """One proximal-gradient step z = argmin_z |z - h|^2 / 2 + R(z), for a regulariser R.

    A subclass gives `cfg` and `encode`. It gives `training_pass` too if training costs more than
    the error, `build` if it has parameters or checks, and `fold_scale_` if those have units
    (`fold_columns_` if those of inputs); `opens_at` and `target_l0` if its L0 is trained.
    """

    cfg: Any
    signed: bool = False
    """Whether codes can be negative."""

    proportional: bool = False
    """Whether codes grow as pre-activations do, all of a token's by one factor."""

    target_l0: float | None = None
    """Active latents per token that a price leads to, if there is one that does."""

    fuses: bool = False
    """Whether its gradient is the identity on active entries and there is no penalty, so that
    the fused training step applies."""

    @property
    def opens_at(self) -> Float[Tensor, " d_sae"] | float | None:
        """The pre-activation above which a latent is active, if that is what makes it so."""
        return None

    def build(self, d_in: int, d_sae: int) -> None:
        """Make parameters for a dictionary of d_sae latents; ValueError if it is too small."""

    @abstractmethod
    def encode(
        self,
        x: Float[Tensor, "N d_in"],
        W_enc: Float[Tensor, "d_sae d_in"],
        b_enc: Float[Tensor, " d_sae"],
    ) -> Codes:
        """The codes of centred inputs with pre-activations h = x W_enc^T + b_enc."""

    def reconstruct(
        self, x: Float[Tensor, "N d_in"], weights: Weights
    ) -> tuple[Float[Tensor, "N d_out"], Codes]:
        """Encode centred inputs and decode the codes."""
        codes = self.encode(x, weights.W_enc, weights.b_enc)
        return codes.decode(weights.W_dec) + weights.b_dec, codes

    def training_pass(
        self,
        x: Float[Tensor, "N d_in"],
        target: Float[Tensor, "N d_out"],
        weights: Weights,
        progress: float,
    ) -> Pass:
        """The same in training, of which a part from 0 to 1 is done, with the penalty."""
        recon, codes = self.reconstruct(x, weights)
        return Pass(recon, codes, recon.new_zeros(()))

    @torch.no_grad()
    def fold_scale_(self, scale: float) -> None:
        """Serve pre-activations and values 1 / scale as large as before."""

    @torch.no_grad()
    def fold_columns_(self, factors: Float[Tensor, " d_in"]) -> None:
        """Serve inputs of 1 / factors what they were, with pre-activations as they were."""

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in vars(self.cfg).items())


def check_least_k(k: int) -> None:
    """ValueError if no latent could be active."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")


def check_k(k: int, d_sae: int) -> None:
    """ValueError if k latents of d_sae cannot be active."""
    if k > d_sae:
        raise ValueError(f"k must be between 1 and d_sae = {d_sae}, got {k}")


def warmed(progress: float, warmup: float) -> float:
    """The factor of a coefficient that rises linearly over the first `warmup` of training."""
    return min(1.0, progress / warmup) if warmup else 1.0
