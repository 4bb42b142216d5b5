"""BatchTopK (arXiv:2412.06410): k active latents per token on average over a batch.

One proximal step for all tokens of a batch together, with an R that is infinite if more than k N
entries are not 0 (or, but for BatchAbsTopK, if one is negative). A token alone has no batch to
share with: outside training, latents above a threshold are active, the running mean of the
smallest value that a training batch kept.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fastsae.codes import Codes
from fastsae.config import check_choices
from fastsae_kernels import encode_topk_batch
from fastsae_kernels.topk import By

from .activation import Activation, ActivationConfig, check_k, check_least_k
from .candidates import Candidates

UNSET = -1.0
"""The threshold before the first batch."""

HINT = 0.8
"""Part of the threshold above which the largest of the next batch are looked for first."""


@dataclass(frozen=True, kw_only=True)
class BatchTopKConfig(ActivationConfig):
    """BatchTopK: the k * N largest pre-activations of a batch of N tokens."""

    name = "batchtopk"

    k: int = 32
    """Active latents per token, on average."""

    by: By = "value"
    """Rank pre-activations by value, or by magnitude keeping their signs (BatchAbsTopK)."""

    momentum: float = 0.95
    """Momentum of the running estimate of the inference threshold."""

    def __post_init__(self):
        check_least_k(self.k)
        check_choices(self, by=By)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, got {self.momentum}")


class BatchTopK(Activation):
    """Keeps the k N largest pre-activations of a batch of N tokens in training mode, and those
    above the threshold in evaluation mode (`sae.eval()`, and after `load`).

    The arguments are those of BatchTopKConfig.
    """

    cfg: BatchTopKConfig
    threshold: Float[Tensor, ""]
    fuses = proportional = True

    def __init__(self, k: int = 32, **settings: Any):
        super().__init__()
        self.cfg = BatchTopKConfig(k=k, **settings)
        self.signed = self.cfg.by == "abs"
        self.register_buffer("threshold", torch.tensor(UNSET))

    def build(self, d_in: int, d_sae: int) -> None:
        check_k(self.cfg.k, d_sae)

    def encode(
        self,
        x: Float[Tensor, "N d_in"],
        W_enc: Float[Tensor, "d_sae d_in"],
        b_enc: Float[Tensor, " d_sae"],
    ) -> Codes:
        if not self.training and self.threshold >= 0:
            threshold = float(self.threshold)
            found = Candidates.above(x, W_enc, b_enc, threshold, self.cfg.by)
            return found.codes(found.pre)
        hint = HINT * max(float(self.threshold), 0.0)
        total = self.cfg.k * len(x)
        pre, indices, count, least = encode_topk_batch(x, W_enc, b_enc, total, self.cfg.by, hint)
        if self.training and len(x):
            self.follow(least)
        found = Candidates.listed(pre, indices, count, x, W_enc, b_enc)
        return found.codes(found.pre)

    @torch.no_grad()
    def follow(self, least: Float[Tensor, ""]) -> None:
        """Take the smallest kept value of a batch into the running mean."""
        least = least.detach().to(self.threshold)
        mean = least.lerp(self.threshold, self.cfg.momentum)
        self.threshold.copy_(torch.where(self.threshold < 0, least, mean))

    @torch.no_grad()
    def fold_scale_(self, scale: float) -> None:
        self.threshold.copy_(
            torch.where(self.threshold < 0, self.threshold, self.threshold / scale)
        )
