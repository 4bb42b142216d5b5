"""The one type that activations, decoders and losses exchange."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Codes(NamedTuple):
    """The few active latents of each token, out of d_sae. An entry of value 0 is inactive."""

    values: Float[Tensor, "N K"]
    indices: Int[Tensor, "N K"]
    d_sae: int

    @property
    def active(self) -> Bool[Tensor, "N K"]:
        return self.values != 0

    def l0(self) -> Float[Tensor, ""]:
        """Active latents per token, on average."""
        return self.active.sum() / max(self.values.shape[0], 1)

    def fired(self) -> Bool[Tensor, " d_sae"]:
        """Which latents are active for at least one token."""
        hits = torch.zeros(self.d_sae, device=self.values.device)
        return hits.index_add_(0, self.indices.flatten(), self.active.flatten().float()).bool()

    def to_dense(self) -> Float[Tensor, "N d_sae"]:
        """The same codes with every inactive latent written out as 0."""
        dense = self.values.new_zeros(self.values.shape[0], self.d_sae)
        return dense.scatter_add(1, self.indices, self.values)
