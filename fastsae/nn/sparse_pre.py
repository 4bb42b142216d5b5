"""Pre-activations above a threshold, sparse or dense.

While few latents are above it, only those are listed, and everything after the encoder GEMM is
sparse. If many are, as in an untrained ReLU SAE, a dense matrix is faster. Activations treat both
alike.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import linear

from fastsae.codes import Codes, at_latents
from fastsae_kernels import By, Ragged, encode_above

DENSE = 1 / 16
"""Fraction of latents above the threshold from which dense matmuls are faster on a CPU."""

WIDEST = 1 / 4
"""Largest fraction of latents in one list: all are padded to the longest."""

PROBE = 128
"""Tokens that decide between sparse and dense."""


class SparsePre(NamedTuple):
    """Pre-activations of some latents of each token, or of all in order (indices are None)."""

    pre: Float[Tensor, "N K"]
    indices: Int[Tensor, "N K"] | None
    active: Bool[Tensor, "N K"]
    """Whether an entry exceeds the threshold; else it is padding, or one of all latents."""
    d_sae: int

    @classmethod
    def above(
        cls,
        x: Float[Tensor, "N d_in"],
        W_enc: Float[Tensor, "d_sae d_in"],
        b_enc: Float[Tensor, " d_sae"],
        threshold: Float[Tensor, " d_sae"] | float,
        by: By = "value",
    ) -> "SparsePre":
        """Encode centered inputs x, keeping what exceeds the threshold (in magnitude, by="abs")."""
        d_sae = W_enc.shape[0]
        if is_dense(x, W_enc, b_enc, threshold, by):
            pre = linear(x, W_enc, b_enc)
            return cls(pre, None, exceeds(pre, threshold, by), d_sae)
        return cls.listed(encode_above(x, W_enc, b_enc, threshold, by), x, W_enc, b_enc)

    @classmethod
    def listed(
        cls,
        found: Ragged,
        x: Float[Tensor, "N d_in"],
        W_enc: Float[Tensor, "d_sae d_in"],
        b_enc: Float[Tensor, " d_sae"],
    ) -> "SparsePre":
        """From an op's ragged rows; dense if one row is so long that padding the others to it
        would cost more."""
        d_sae = W_enc.shape[0]
        if found.indices.shape[1] <= WIDEST * d_sae:
            return cls(found.values, found.indices, found.listed, d_sae)
        hits = torch.zeros(len(x), d_sae, dtype=torch.int8, device=x.device)
        active = hits.scatter_add_(1, found.indices, found.listed.to(torch.int8)).bool()
        return cls(linear(x, W_enc, b_enc), None, active, d_sae)

    def pick(self, parameter: Float[Tensor, " d_sae"]) -> Float[Tensor, "... K"]:
        """Gather one value per latent at each entry."""
        return at_latents(parameter, self.indices)

    def codes(self, values: Float[Tensor, "N K"]) -> Codes:
        """Codes of these values, 0 where not active."""
        return Codes(values.where(self.active, 0.0), self.indices, self.d_sae)


@torch.no_grad()
def is_dense(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor | float, by: By = "value"
) -> bool:
    """Whether so many latents exceed the threshold that dense matmuls are faster.

    Judged by the first tokens, so that it depends on the batch alone. Synchronizes with a GPU.
    """
    some = exceeds(linear(x[:PROBE], W_enc, b_enc), threshold, by)
    return some.numel() > 0 and float(some.float().mean()) > DENSE


def exceeds(pre: Tensor, threshold: Tensor | float, by: By) -> Bool[Tensor, "N d_sae"]:
    return (pre.abs() if by == "abs" else pre) > threshold
