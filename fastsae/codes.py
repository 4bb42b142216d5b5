"""The one type that activations, decoders and losses exchange."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastsae_kernels import decode, gather_dot


class Codes(NamedTuple):
    """The few active latents of each token, out of d_sae. An entry of value 0 is inactive.

    Tokens with fewer active latents than others are padded with entries of value 0 to the most
    that any token of the batch has. Where most latents are active, values hold all of them in
    order, [N, d_sae], and indices are None.
    """

    values: Float[Tensor, "N K"]
    indices: Int[Tensor, "N K"] | None
    d_sae: int

    @classmethod
    def every(cls, values: Float[Tensor, "N d_sae"]) -> "Codes":
        """Codes that hold all latents in order, decoded by a dense matmul."""
        return cls(values, None, values.shape[1])

    @property
    def active(self) -> Bool[Tensor, "N K"]:
        return self.values != 0

    def latents(self) -> Int[Tensor, "N K"]:
        """The latent of each entry, spelled out also where indices are None."""
        if self.indices is not None:
            return self.indices
        return torch.arange(self.d_sae, device=self.values.device).expand(len(self.values), -1)

    def l0(self) -> Float[Tensor, ""]:
        """Active latents per token, on average."""
        return self.active.sum() / max(self.values.shape[0], 1)

    def fired(self) -> Bool[Tensor, " d_sae"]:
        """Which latents are active for at least one token."""
        if self.indices is None:
            return self.active.any(0)
        hits = torch.zeros(self.d_sae, dtype=torch.float32, device=self.values.device)
        return hits.index_add_(0, self.indices.flatten(), self.active.flatten().float()).bool()

    def decode(self, W_dec: Float[Tensor, "d_sae d_out"]) -> Float[Tensor, "N d_out"]:
        """The sum of the decoder's rows, weighted by the values."""
        if self.indices is None:
            return self.values @ W_dec
        return decode(self.values, self.indices, W_dec)

    def below(self, d_sae: int) -> "Codes":
        """The same codes with latents from d_sae on made inactive."""
        return self._replace(values=self.values.where(self.latents() < d_sae, 0.0))

    def to_dense(self) -> Float[Tensor, "N d_sae"]:
        """The same codes with every inactive latent written out as 0."""
        if self.indices is None:
            return self.values
        dense = self.values.new_zeros(self.values.shape[0], self.d_sae)
        return dense.scatter_add(1, self.indices, self.values)


def at_latents(
    parameter: Float[Tensor, " d_sae"], indices: Int[Tensor, "N K"] | None
) -> Float[Tensor, "... K"]:
    """A parameter of each latent for each entry of codes with these indices."""
    if indices is None:
        return parameter
    return gather_dot(parameter.new_ones(len(indices), 1), indices, parameter[:, None])
