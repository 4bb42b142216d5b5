"""The variance of a batch, and fractions of it."""

import torch
from jaxtyping import Float
from torch import Tensor

from fastsae_kernels import nonzero_variance


def total_variance(x: Float[Tensor, "N d_in"]) -> Float[Tensor, ""]:
    """Summed squared distance of the rows from their mean: the denominator of FVU. Equal rows have
    none, whatever their mean is rounded to."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = wide.mean(0)
    return nonzero_variance((wide - mean).square().sum(), mean, len(x)).to(x.dtype)


def fraction(part: Float[Tensor, ""], variance: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """part / variance, and 0 of a batch without variance: it does not train the reconstruction."""
    none = variance == 0  # divides by 1 then, lest the gradient be NaN
    return torch.where(none, 0.0, part) / torch.where(none, 1.0, variance)
