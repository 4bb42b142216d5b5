"""Latents whose pre-activation exceeds a threshold: how many there are differs from token to token.

While they are few, only they are listed, and all that follows is sparse. An untrained ReLU's half
of all latents are cheaper as a dense matrix. What activations do with candidates is the same.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import linear

from fastsae.codes import Codes, at_latents
from fastsae_kernels import By, Ragged, encode_above

DENSE = 1 / 16
"""Part of the latents that a token lists, from which on dense products are faster on a CPU."""

WIDEST = 1 / 4
"""Part of the latents that the longest list may hold: all lists are as long as that one."""

PROBE = 128
"""Tokens by which the choice between few and many is made."""


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
        """Those of centred inputs x whose pre-activation (or its magnitude) is above."""
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
        """Those that an op listed; all latents where one token's list is so long that the padding
        of the others would cost more."""
        d_sae = W_enc.shape[0]
        if found.indices.shape[1] <= WIDEST * d_sae:
            return cls(found.values, found.indices, found.listed, d_sae)
        hits = torch.zeros(len(x), d_sae, dtype=torch.int8, device=x.device)
        active = hits.scatter_add_(1, found.indices, found.listed.to(torch.int8)).bool()
        return cls(linear(x, W_enc, b_enc), None, active, d_sae)

    def pick(self, parameter: Float[Tensor, " d_sae"]) -> Float[Tensor, "... K"]:
        """A parameter of each latent, where the latent is listed."""
        return at_latents(parameter, self.indices)

    def codes(self, values: Float[Tensor, "N K"]) -> Codes:
        """Codes of these values, 0 where not active."""
        return Codes(values.where(self.active, 0.0), self.indices, self.d_sae)


@torch.no_grad()
def is_dense(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor | float, by: By = "value"
) -> bool:
    """Whether so many latents exceed the threshold that dense products are faster.

    Judged by a few tokens, so that it depends on nothing but the batch; this waits for a GPU.
    """
    some = exceeds(linear(x[:PROBE], W_enc, b_enc), threshold, by)
    return some.numel() > 0 and float(some.float().mean()) > DENSE


def exceeds(pre: Tensor, threshold: Tensor | float, by: By) -> Bool[Tensor, "N d_sae"]:
    return (pre.abs() if by == "abs" else pre) > threshold
