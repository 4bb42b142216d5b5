"""BatchTopK (arXiv:2412.06410): k active latents per token on average over a batch.

One proximal step for all tokens of a batch together, with an R that is infinite if more than k N
entries are not 0 (or, except in BatchAbsTopK, if one is negative). A token alone has no batch to
share with: outside training, latents above a threshold are active, the running mean of the
smallest value that a training batch kept.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fastsae.codes import Codes, check_k
from fastsae.config import check_choices
from fastsae_kernels import By, encode_topk_batch

from .activation import Activation, ActivationConfig, Inputs, Weights
from .sparse_pre import SparsePre

UNSET = -1.0
"""The threshold before the first batch."""

HINT = 0.8
"""Fraction of the threshold that serves as the first guess for the next batch."""


@dataclass(frozen=True, kw_only=True)
class BatchTopKConfig(ActivationConfig):
    """BatchTopK: the k * N largest pre-activations of a batch of N tokens."""

    name = "batchtopk"

    k: int = field(default=32, kw_only=False)
    """Active latents per token, on average."""

    by: By = "value"
    """Rank pre-activations by value, or by magnitude keeping their signs (BatchAbsTopK)."""

    momentum: float = 0.95
    """Momentum of the running estimate of the inference threshold."""

    def __post_init__(self):
        check_k(self.k)
        check_choices(self, by=By)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, got {self.momentum}")


class BatchTopK(Activation, config=BatchTopKConfig):
    """Keeps the k N largest pre-activations of a batch of N tokens in training mode, and those
    above the threshold in evaluation mode (`sae.eval()`, and after `load`).

    The arguments are those of BatchTopKConfig.
    """

    cfg: BatchTopKConfig
    threshold: Float[Tensor, ""]
    supports_fused_step = scale_equivariant = True

    def __init__(self, *values: Any, **settings: Any):
        super().__init__(*values, **settings)
        self.signed = self.cfg.by == "abs"
        self.register_buffer("threshold", torch.tensor(UNSET))

    def build(self, d_in: int, d_sae: int) -> None:
        check_k(self.cfg.k, d_sae)

    def encode(self, x: Inputs, weights: Weights) -> Codes:
        encoder, threshold = weights[:2], float(self.threshold)
        if not self.training and threshold >= 0:
            found = SparsePre.above(x, *encoder, threshold, self.cfg.by)
        else:
            # In training, each place on the data axis has other tokens of the batch.
            places = self.shards.data if self.training else 1
            total = self.cfg.k * len(x) * places
            # Each place lists `total` entries, so that the smallest is below the batch's threshold.
            hint = HINT * max(threshold, 0.0) if places == 1 else 0.0
            own = min(total, len(x) * len(weights.W_enc))
            listed = encode_topk_batch(x, *encoder, own, self.cfg.by, hint)
            found = SparsePre.listed(listed, x, *encoder)
            codes = found.codes(found.pre)
            return self.shards.keep_best_of_batch(codes, total, self.cfg.by, self.training)
        return found.codes(found.pre)

    @torch.no_grad()
    def after_step(self, codes: Codes) -> None:
        """Update the running mean with the smallest value that the batch kept, or 0."""
        if not codes.values.numel():
            return
        least = self.shards.smallest(codes.values.abs().where(codes.active, torch.inf).amin())
        least = least.where(least.isfinite(), 0.0).to(self.threshold)
        mean = least.lerp(self.threshold, self.cfg.momentum)
        self.threshold.copy_(torch.where(self.threshold < 0, least, mean))

    @torch.no_grad()
    def fold_scale_(self, scale: float) -> None:
        self.threshold.copy_(
            torch.where(self.threshold < 0, self.threshold, self.threshold / scale)
        )
