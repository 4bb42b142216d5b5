"""The one type that activations, decoders and losses exchange."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastsae_kernels import decode


class Codes(NamedTuple):
    """The few active latents of each token, out of d_sae. An entry of value 0 is inactive.

    Tokens with fewer active latents than others are padded with entries of value 0 to the most
    that any token of the batch has. Where most latents are active, `Codes.every` holds them all.
    """

    values: Float[Tensor, "N K"]
    indices: Int[Tensor, "N K"]
    d_sae: int

    @classmethod
    def every(cls, values: Float[Tensor, "N d_sae"]) -> "Codes":
        """Codes that list all latents in their order, decoded by a dense product."""
        N, d_sae = values.shape
        return cls(values, every_latent(N, d_sae, values.device), d_sae)

    @property
    def active(self) -> Bool[Tensor, "N K"]:
        return self.values != 0

    def l0(self) -> Float[Tensor, ""]:
        """Active latents per token, on average."""
        return self.active.sum() / max(self.values.shape[0], 1)

    def fired(self) -> Bool[Tensor, " d_sae"]:
        """Which latents are active for at least one token."""
        if lists_every_latent(self.indices, self.d_sae):
            return self.active.any(0)
        hits = torch.zeros(self.d_sae, dtype=torch.float32, device=self.values.device)
        return hits.index_add_(0, self.indices.flatten(), self.active.flatten().float()).bool()

    def decode(self, W_dec: Float[Tensor, "d_sae d_out"]) -> Float[Tensor, "N d_out"]:
        """The sum of the decoder's rows, weighted by the values."""
        if lists_every_latent(self.indices, self.d_sae):
            return self.values @ W_dec
        return decode(self.values, self.indices, W_dec)

    def below(self, d_sae: int) -> "Codes":
        """The same codes with latents from d_sae on made inactive."""
        return self._replace(values=self.values.where(self.indices < d_sae, 0.0))

    def to_dense(self) -> Float[Tensor, "N d_sae"]:
        """The same codes with every inactive latent written out as 0."""
        if lists_every_latent(self.indices, self.d_sae):
            return self.values
        dense = self.values.new_zeros(self.values.shape[0], self.d_sae)
        return dense.scatter_add(1, self.indices, self.values)


def every_latent(N: int, d_sae: int, device: torch.device) -> Int[Tensor, "N d_sae"]:
    """All latents of each token, in memory only once."""
    return torch.arange(d_sae, device=device).expand(N, -1)


def lists_every_latent(indices: Int[Tensor, "N K"], d_sae: int) -> bool:
    """Whether indices are what `every_latent` made, as is seen from their layout alone."""
    return indices.shape[1] == d_sae and indices.stride() == (0, 1)
