"""Sparse codes: the type that activations, decoders and losses exchange."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastsae_kernels import decode, gather_dot


class Codes(NamedTuple):
    """The active latents of each token, out of d_sae. An entry with value 0 is inactive.

    Tokens are padded with entries of value 0 to the largest number of active latents in the batch.
    If many latents are active, indices are None, and values are [N, d_sae]: one per latent.
    """

    values: Float[Tensor, "N K"]
    indices: Int[Tensor, "N K"] | None
    d_sae: int

    @classmethod
    def every(cls, values: Float[Tensor, "N d_sae"]) -> "Codes":
        """Codes from the values of all latents, decoded by a dense matmul."""
        return cls(values, None, values.shape[1])

    @property
    def active(self) -> Bool[Tensor, "N K"]:
        return self.values != 0

    def latents(self) -> Int[Tensor, "N K"]:
        """The latent of each entry: the indices, also if all latents are listed."""
        if self.indices is not None:
            return self.indices
        return torch.arange(self.d_sae, device=self.values.device).expand(len(self.values), -1)

    def l0(self) -> Float[Tensor, ""]:
        """Mean number of active latents per token."""
        return self.active.sum() / max(self.values.shape[0], 1)

    def fired(self) -> Bool[Tensor, " d_sae"]:
        """Which latents are active for at least one token."""
        if self.indices is None:
            return self.active.any(0)
        hits = torch.zeros(self.d_sae, dtype=torch.float32, device=self.values.device)
        return hits.index_add_(0, self.indices.flatten(), self.active.flatten().float()).bool()

    def decode(self, W_dec: Float[Tensor, "d_sae d_out"]) -> Float[Tensor, "N d_out"]:
        """Sum of decoder rows, weighted by the values; without b_dec."""
        if self.indices is None:
            return self.values @ W_dec
        return decode(self.values, self.indices, W_dec)

    def below(self, d_sae: int) -> "Codes":
        """The same codes with all but the first d_sae latents set to 0."""
        return self._replace(values=self.values.where(self.latents() < d_sae, 0.0))

    def to_dense(self) -> Float[Tensor, "N d_sae"]:
        """The codes as a dense tensor."""
        if self.indices is None:
            return self.values
        dense = self.values.new_zeros(self.values.shape[0], self.d_sae)
        return dense.scatter_add(1, self.indices, self.values)


def at_latents(
    parameter: Float[Tensor, " d_sae"], indices: Int[Tensor, "N K"] | None
) -> Float[Tensor, "... K"]:
    """Gather one value per latent at each entry of codes with these indices."""
    if indices is None:
        return parameter
    return gather_dot(parameter.new_ones(len(indices), 1), indices, parameter[:, None])


def check_k(k: int, d_sae: int | None = None) -> None:
    """ValueError unless k latents (of d_sae) can be active."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if d_sae is not None and k > d_sae:
        raise ValueError(f"k must be between 1 and d_sae = {d_sae}, got {k}")
