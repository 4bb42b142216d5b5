"""TopK (Gao et al. 2024, arXiv:2406.04093) and AbsTopK (arXiv:2510.00404).

Both are one proximal-gradient step, argmin_z ||z - pre||^2 / 2 + R(z), where R forbids more than
k non-zeros per token; TopK's R forbids negative ones too, AbsTopK keeps the sign.
"""

from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn

from fastsae.codes import Codes
from fastsae_kernels import encode_decode, encode_topk, topk
from fastsae_kernels.topk import By

Gradient = Literal["straight_through", "rotation"]
Rotation = Literal["support", "dense"]


@dataclass(frozen=True, kw_only=True)
class TopKConfig:
    """Keep k pre-activations of each token."""

    k: int = 32
    """Active latents per token."""

    by: By = "value"
    """What is ranked: the pre-activation, or its magnitude (AbsTopK, which keeps the sign)."""

    gradient: Gradient = "straight_through"
    """What reaches the pre-activations: the gradient of the kept ones, or that gradient rotated
    and scaled as the choice rotated and scaled them (arXiv:2410.06424). The rotation applies where
    encoding and decoding are one, in `sae(x)`, `sae.reconstruct` and training; not in `encode`."""

    rotation: Rotation = "support"
    """Whose gradient is rotated: that of the kept latents, or of all."""

    def __post_init__(self):
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")
        if self.by not in ("value", "abs"):
            raise ValueError(f'by must be "value" or "abs", got {self.by!r}')
        if self.gradient not in ("straight_through", "rotation"):
            raise ValueError(
                f'gradient must be "straight_through" or "rotation", got {self.gradient!r}'
            )
        if self.rotation not in ("support", "dense"):
            raise ValueError(f'rotation must be "support" or "dense", got {self.rotation!r}')
        if self.rotation == "dense" and self.gradient != "rotation":
            raise ValueError('rotation "dense" has no effect without gradient "rotation"')


class TopK(nn.Module):
    """Keeps the k largest pre-activations of each token; ties go to the lowest latent.

    `TopK(k=32)` sets those below 0 to 0; `TopK(k=32, by="abs")` ranks magnitudes and keeps signs.
    The arguments are those of TopKConfig.
    """

    def __init__(
        self,
        k: int = 32,
        by: By = "value",
        gradient: Gradient = "straight_through",
        rotation: Rotation = "support",
    ):
        super().__init__()
        self.cfg = TopKConfig(k=k, by=by, gradient=gradient, rotation=rotation)

    @property
    def signed(self) -> bool:
        """Whether codes can be negative."""
        return self.cfg.by == "abs"

    def check(self, d_sae: int) -> None:
        """Raise ValueError if a dictionary of d_sae latents is too small."""
        if self.cfg.k > d_sae:
            raise ValueError(f"k must be between 1 and d_sae = {d_sae}, got {self.cfg.k}")

    def forward(self, pre: Float[Tensor, "N d_sae"]) -> Codes:
        return Codes(*topk(pre, self.cfg.k, self.cfg.by), pre.shape[1])

    def encode(
        self,
        x: Float[Tensor, "N d_in"],
        W_enc: Float[Tensor, "d_sae d_in"],
        b_enc: Float[Tensor, " d_sae"],
        shadow: Float[Tensor, "d_sae d_in"] | None = None,
    ) -> Codes:
        """The same codes from centred inputs, without a tensor of all pre-activations."""
        values, indices = encode_topk(x, W_enc, b_enc, self.cfg.k, self.cfg.by, shadow=shadow)
        return Codes(values, indices, W_enc.shape[0])

    def reconstruct(
        self,
        x: Float[Tensor, "N d_in"],
        W_enc: Float[Tensor, "d_sae d_in"],
        b_enc: Float[Tensor, " d_sae"],
        W_dec: Float[Tensor, "d_sae d_out"],
        b_dec: Float[Tensor, " d_out"],
    ) -> tuple[Float[Tensor, "N d_out"], Codes]:
        """Encode centred inputs and decode the codes, with the gradient that was chosen."""
        cfg = self.cfg
        gradient = "straight_through"
        if cfg.gradient == "rotation":
            gradient = "rotation_dense" if cfg.rotation == "dense" else "rotation_support"
        recon, values, indices = encode_decode(
            x, W_enc, b_enc, W_dec, b_dec, cfg.k, cfg.by, gradient
        )
        return recon, Codes(values, indices, W_enc.shape[0])

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in vars(self.cfg).items())


def AbsTopK(k: int = 32, **settings: Any) -> TopK:
    """Keeps the k pre-activations of largest magnitude with their signs (arXiv:2510.00404)."""
    return TopK(k, by="abs", **settings)
