"""The activation interface: pre-activations in, sparse codes out, with an optional penalty."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fastsae.codes import Codes
from fastsae.shards import ONE_PROCESS, Shards

Inputs = Float[Tensor, "N d_in"]
"""Tokens as the encoder sees them: in an autoencoder, less b_dec."""
Targets = Float[Tensor, "N d_out"]
"""What is to be reconstructed."""
Penalized = tuple[Codes, Float[Tensor, ""]]
"""Codes in training, and their penalty."""


class Weights(NamedTuple):
    """The parameters of an SAE as an activation sees them."""

    W_enc: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_out"]
    b_dec: Float[Tensor, " d_out"]
    shards: Shards = ONE_PROCESS
    """The processes among which the rows are divided."""

    def decode(self, codes: Codes) -> Float[Tensor, "N d_out"]:
        """The output for the codes of all processes, of which these are this one's."""
        return self.shards.total(codes.decode(self.W_dec)) + self.b_dec


@dataclass(frozen=True, kw_only=True)
class ActivationConfig:
    """The settings of an activation, as they are saved; `name` is what it is chosen by."""

    name: ClassVar[str]
    activation: ClassVar["type[Activation]"]

    @staticmethod
    def named(name: Any) -> "type[ActivationConfig]":
        """The settings of the activation of that name; ValueError lists those there are."""
        if name not in CONFIGS:
            raise ValueError(f"activation must be one of {', '.join(CONFIGS)}, got {name!r}")
        return CONFIGS[name]

    def build(self) -> "Activation":
        """The activation with these settings."""
        return self.activation(self)


CONFIGS: dict[str, type[ActivationConfig]] = {}
"""The settings of every activation by its name: to define the class registers it."""


class Activation(nn.Module, ABC):
    """One proximal-gradient step z = argmin_z |z - h|^2 / 2 + R(z), for a regularizer R.

    `class Mine(Activation, config=MineConfig)` registers a subclass. It defines `encode`; also
    `penalized` if training has a sparsity penalty, `after_step` if something adapts in training,
    `build` if it has parameters, buffers or checks, `fold_scale_` if those have units
    (`fold_columns_` if those of inputs, `fold_mean_` if some are biases), and
    `activation_threshold` and `target_l0` if its L0 is trained.
    """

    config: ClassVar[type[ActivationConfig]]
    cfg: Any

    signed: bool = False
    """Whether codes can be negative."""

    scale_equivariant: bool = False
    """Whether scaling all pre-activations of a token scales its codes by the same factor."""

    target_l0: float | None = None
    """Active latents per token that the penalty is adapted to reach, if any."""

    supports_fused_step: bool = False
    """Whether its gradient is the identity on active entries and there is no penalty."""

    decodes: bool = False
    """Whether training decodes by `reconstruct`, one op with a gradient of its own."""

    needs_autoencoder: bool = False
    """Whether codes are compared with the input, which the decoder must then reconstruct, in the
    units of the input."""

    shards: Shards = ONE_PROCESS
    """The processes among which the latents are divided: codes, and parameters with one row per
    latent, are those of this process; penalties are of all."""

    def __init_subclass__(cls, config: type[ActivationConfig], **kwargs: Any):
        super().__init_subclass__(**kwargs)
        cls.config, config.activation = config, cls
        CONFIGS[config.name] = config

    def __init__(self, *values: Any, **settings: Any):
        """Takes its config, `TopK(cfg)`, or the arguments of one, `TopK(k=32)`."""
        super().__init__()
        given = len(values) == 1 and isinstance(values[0], self.config) and not settings
        self.cfg = values[0] if given else self.config(*values, **settings)

    @property
    def activation_threshold(self) -> Float[Tensor, " d_sae"] | float | None:
        """The pre-activation above which a latent is active, if that is what decides it."""
        return None

    def build(self, d_in: int, d_sae: int) -> None:
        """Make parameters for a dictionary of d_sae latents; ValueError if it is too small."""

    @abstractmethod
    def encode(self, x: Inputs, weights: Weights) -> Codes:
        """The codes of centered inputs with pre-activations h = x W_enc^T + b_enc."""

    def reconstruct(
        self, x: Float[Tensor, "N d_in"], weights: Weights
    ) -> tuple[Float[Tensor, "N d_out"], Codes]:
        """Encode centered inputs and decode the codes."""
        codes = self.encode(x, weights)
        return weights.decode(codes), codes

    def penalized(self, x: Inputs, target: Targets, weights: Weights, progress: float) -> Penalized:
        """Codes in training, and the penalty, which is averaged over tokens and in units of a
        token's squared error. `progress` is the fraction of training that is done."""
        return self.encode(x, weights), x.new_zeros(())

    @torch.no_grad()
    def after_step(self, codes: Codes) -> None:
        """Adapt what is not a parameter to the codes of the batch that a step has taken."""

    @torch.no_grad()
    def fold_scale_(self, scale: float) -> None:
        """Rescale parameters for inputs divided by `scale`."""

    @torch.no_grad()
    def fold_mean_(self, mean: Float[Tensor, " d_in"], weights: Weights) -> None:
        """Move what is added to linear maps of inputs other than b_enc, for inputs plus `mean`."""

    @torch.no_grad()
    def fold_columns_(self, factors: Float[Tensor, " d_in"]) -> None:
        """Rescale parameters for inputs divided by `factors`, with the same pre-activations."""

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in vars(self.cfg).items())


def warmed(progress: float, warmup: float) -> float:
    """The factor of a coefficient that rises linearly over the first `warmup` of training."""
    return min(1.0, progress / warmup) if warmup else 1.0
