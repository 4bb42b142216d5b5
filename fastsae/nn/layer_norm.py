"""Layer norm of tokens before the encoder, and its inverse after the decoder (arXiv:2406.04093)."""

import torch
from jaxtyping import Float
from torch import Tensor

EPS = 1e-5
"""Added to a token's standard deviation, as OpenAI and SAELens do."""


def layer_norm(x: Float[Tensor, "N d_in"], layers: int = 1) -> Float[Tensor, "N d_in"]:
    """Tokens with a mean of 0 and a standard deviation of 1 in each of `layers` equal parts."""
    mean, deviation = moments(x, layers)
    return ((x.unflatten(1, (layers, -1)) - mean) / (deviation + EPS)).flatten(1)


def undo_layer_norm(
    recon: Float[Tensor, "N d_in"], x: Float[Tensor, "N d_in"], layers: int = 1
) -> Float[Tensor, "N d_in"]:
    """Reconstructions of normalized tokens with the means and deviations of the tokens x."""
    mean, deviation = moments(x, layers)
    return (recon.unflatten(1, (layers, -1)) * deviation + mean).flatten(1)


def moments(
    x: Float[Tensor, "N d_in"], layers: int
) -> tuple[Float[Tensor, "N layers 1"], Float[Tensor, "N layers 1"]]:
    """Mean and standard deviation (over n - 1) of each token's parts, also of no tokens at all."""
    parts = x.unflatten(1, (layers, -1))
    mean = parts.mean(2, keepdim=True)
    norm = torch.linalg.vector_norm(parts - mean, dim=2, keepdim=True)
    return mean, norm / (parts.shape[2] - 1) ** 0.5
