"""What is minimized: settings of the loss."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fastsae.config import check_choices
from fastsae.nn import SAE, TopK

from .variance import fraction

Error = Literal["fvu", "log_fvu", "sse"]
AuxError = Literal["relative", "absolute"]

WIDER = 4
"""Multi-TopK's second reconstruction takes this many times k (arXiv:2406.04093, A.6)."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Loss."""

    error: Error = "log_fvu"
    """Reconstruction error: fraction of the batch's variance that is unexplained (fvu), its
    logarithm (log_fvu), or squared error summed over coordinates and averaged over tokens (sse).
    With log_fvu, all gradients are divided by FVU, so they do not shrink as the error falls."""

    prefixes: tuple[int, ...] = ()
    """Increasing sizes of nested dictionaries: the first N latents must also reconstruct on their
    own (Matryoshka SAE, arXiv:2503.17547)."""

    multi_k: bool = False
    """Multi-TopK: also reconstruct from 4 k latents, weighted by 1/8."""

    auxk_coef: float = 1 / 32
    """Coefficient of the auxiliary loss that revives dead latents; 0 disables it."""

    k_aux: int | None = None
    """Dead latents per token in the auxiliary loss (default: d_out / 2)."""

    auxk_error: AuxError = "relative"
    """Auxiliary error relative to the residual's variance, or absolute: summed over coordinates and
    averaged over tokens."""

    def __post_init__(self):
        check_choices(self, error=Error, auxk_error=AuxError)
        rising = (0, *self.prefixes)
        if any(b <= a for a, b in zip(rising, rising[1:], strict=False)):
            raise ValueError(f"prefixes must be above 0 and rise, got {self.prefixes}")
        if not self.auxk_coef >= 0:
            raise ValueError(f"auxk_coef must be at least 0, got {self.auxk_coef}")
        if self.k_aux is not None and self.k_aux < 1:
            raise ValueError(f"k_aux must be at least 1, got {self.k_aux}")
        if self.auxk_coef == 0 and self.k_aux is not None:
            raise ValueError(f"k_aux = {self.k_aux} has no effect with auxk_coef = 0")
        if self.auxk_coef == 0 and self.auxk_error != "relative":
            raise ValueError(f'auxk_error "{self.auxk_error}" has no effect with auxk_coef = 0')

    def check(self, sae: SAE) -> None:
        """ValueError unless the objective fits the SAE."""
        if self.prefixes and self.prefixes[-1] > sae.d_sae:
            raise ValueError(f"prefixes must be at most d_sae = {sae.d_sae}, got {self.prefixes}")
        if self.prefixes == (sae.d_sae,):
            raise ValueError(
                f"prefixes {self.prefixes} have no effect: all latents count always, name fewer"
            )
        if self.prefixes and getattr(sae.activation.cfg, "rotation", None) == "dense":
            raise ValueError(
                'rotation="dense" cannot be combined with prefixes; use rotation="support"'
            )
        if self.multi_k:
            top_k = isinstance(sae.activation, TopK) and sae.activation.supports_fused_step
            if not top_k or sae.activation.cfg.k * WIDER > sae.d_sae:
                raise ValueError(
                    f"multi_k needs topk without rotation and {WIDER} k latents, "
                    f"got {sae.activation} and d_sae = {sae.d_sae}"
                )

    def value(
        self, error: Float[Tensor, ""], variance: Float[Tensor, ""], N: int
    ) -> Float[Tensor, ""]:
        """The reconstruction loss of N tokens, from their summed error and total variance."""
        if self.error == "sse":
            return error / max(N, 1)
        fvu = fraction(error, variance)
        return torch.where(fvu == 0, 1.0, fvu).log() if self.error == "log_fvu" else fvu

    def unit(
        self, error: Float[Tensor, ""], variance: Float[Tensor, ""], N: int
    ) -> Float[Tensor, ""]:
        """The derivative of `value` with respect to the error, which scales all gradients."""
        if self.error == "sse":
            return torch.full_like(variance, 1 / max(N, 1))
        return fraction(self.proportion(error, variance), variance)

    def proportion(
        self, error: Float[Tensor, ""], variance: Float[Tensor, ""]
    ) -> Float[Tensor, ""]:
        """Factor that keeps the aux loss in proportion to the error's gradient: 1 / FVU if its
        logarithm is minimized."""
        one = torch.ones_like(variance)
        if self.error != "log_fvu":
            return one
        fvu = fraction(error, variance)  # as small as 1 / FVU can be represented
        return fraction(one, torch.where(fvu == 0, 0.0, fvu.clamp_min(torch.finfo(fvu.dtype).tiny)))

    @property
    def plain(self) -> bool:
        """Whether the error is that of a single reconstruction."""
        return not (self.prefixes or self.multi_k)
