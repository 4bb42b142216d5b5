"""TopK (Gao et al. 2024, arXiv:2406.04093) and AbsTopK (arXiv:2510.00404).

Both are one proximal step, argmin_z |z - h|^2 / 2 + R(z), where R(z) is infinite if more than k
entries of a token are not 0, and else 0. TopK's R forbids negative entries too; AbsTopK keeps the
sign.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from jaxtyping import Float
from torch import Tensor

from fastsae.codes import Codes, check_k
from fastsae.config import check_choices
from fastsae_kernels import By, Shadow, encode_decode, encode_topk

from .activation import Activation, ActivationConfig, Weights
from .correction import corrected

Gradient = Literal["straight_through", "rotation"]
Rotation = Literal["support", "dense"]


@dataclass(frozen=True, kw_only=True)
class TopKConfig(ActivationConfig):
    """TopK: the k largest pre-activations of each token."""

    name = "topk"

    k: int = field(default=32, kw_only=False)
    """Active latents per token."""

    by: By = "value"
    """Rank pre-activations by value, or by magnitude keeping their signs (AbsTopK)."""

    gradient: Gradient = "straight_through"
    """Gradient with respect to the pre-activations: straight-through, or the rotation trick
    (arXiv:2410.06424), which rotates and scales it as the selection rotated and scaled them. The
    rotation applies in `sae(x)`, `sae.reconstruct` and training, where encoding and decoding are
    one operation; not in `encode`."""

    rotation: Rotation | None = None
    """Which latents the rotation reaches: the active ones (support, the default), or all (dense),
    from the gradient that their codes would get."""

    corrections: int = 0
    """Outside training, correct the values of the active latents this many times by what their
    reconstruction leaves of the input: lower error with the same latents or fewer. Autoencoders
    only."""

    def __post_init__(self):
        check_k(self.k)
        if self.corrections < 0:
            raise ValueError(f"corrections must be at least 0, got {self.corrections}")
        if self.corrections and self.gradient == "rotation":
            raise ValueError('corrections need gradient "straight_through", got "rotation"')
        check_choices(self, by=By, gradient=Gradient)
        if self.rotation not in (None, *get_args(Rotation)):
            raise ValueError(f"rotation must be one of {get_args(Rotation)}, got {self.rotation!r}")
        if self.rotation is not None and self.gradient != "rotation":
            raise ValueError(
                f'rotation = {self.rotation} has no effect without gradient "rotation"'
            )


class TopK(Activation, config=TopKConfig):
    """Keeps the k largest pre-activations of each token; ties go to the lowest latent.

    `TopK(k=32)` sets those below 0 to 0; `TopK(k=32, by="abs")` ranks magnitudes and keeps signs.
    With `corrections`, values are corrected in evaluation mode (`sae.eval()`, and after `load`).
    The arguments are those of TopKConfig.
    """

    cfg: TopKConfig
    scale_equivariant = True

    def __init__(self, *values: Any, **settings: Any):
        super().__init__(*values, **settings)
        self.signed = self.cfg.by == "abs"
        self.decodes = self.cfg.gradient == "rotation"
        self.supports_fused_step = not self.decodes
        self.needs_autoencoder = self.cfg.corrections > 0

    def build(self, d_in: int, d_sae: int) -> None:
        check_k(self.cfg.k, d_sae)

    def encode(
        self,
        x: Float[Tensor, "N d_in"],
        weights: Weights,
        shadow: Shadow | None = None,
        k: int | None = None,
    ) -> Codes:
        """The codes of centered inputs, without a tensor of all pre-activations; largest first, but
        for corrections.

        `shadow` is a low-precision copy of W_enc that finds candidates; `k` replaces the config's,
        without corrections.
        """
        steps = 0 if self.training or k is not None else self.cfg.corrections
        W_enc, b_enc, k, by = weights.W_enc, weights.b_enc, k or self.cfg.k, self.cfg.by
        own = min(k, len(W_enc))
        values, indices = encode_topk(x, W_enc, b_enc, own, by, shadow=shadow)
        codes = self.shards.keep_best(Codes(values, indices, len(W_enc)), k, by)
        return corrected(codes, x, weights, steps, self.signed) if steps else codes

    def reconstruct(
        self, x: Float[Tensor, "N d_in"], weights: Weights
    ) -> tuple[Float[Tensor, "N d_out"], Codes]:
        """Encode centered inputs and decode the codes, with the gradient of the config."""
        cfg = self.cfg
        if not self.decodes:
            return super().reconstruct(x, weights)
        gradient = "rotation_dense" if cfg.rotation == "dense" else "rotation_support"
        recon, values, indices = encode_decode(x, *weights[:4], cfg.k, cfg.by, gradient)
        return recon, Codes(values, indices, weights.W_enc.shape[0])


def AbsTopK(k: int = 32, **settings: Any) -> TopK:
    """Keeps the k pre-activations of largest magnitude with their signs (arXiv:2510.00404)."""
    return TopK(k, by="abs", **settings)
