"""Where training starts: tied unit rows, zero encoder bias, b_dec at the middle of the data."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from .sae import SAE


def geometric_median(
    x: Float[Tensor, "N d_in"], steps: int = 100, tolerance: float = 1e-5
) -> Float[Tensor, " d_in"]:
    """The point whose summed distance to the rows of x is least (Weiszfeld's iteration).

    Stops when it moves by less than `tolerance` of the rows' mean distance.
    """
    median = x.mean(0)
    for _ in range(steps):
        distance = (x - median).norm(dim=1)
        if not distance.any():
            break
        weight = distance.clamp_min(torch.finfo(x.dtype).eps * distance.mean()).reciprocal()
        moved = weight @ x / weight.sum()
        still = (moved - median).norm() <= tolerance * distance.mean()
        median = moved
        if still:
            break
    return median


@torch.no_grad()
def init_from_data(
    sae: SAE, x: Float[Tensor, "N d_in"], generator: torch.Generator | None = None
) -> SAE:
    """Initialise an autoencoder for a sample x of its data (arXiv:2406.04093).

    Decoder rows are random directions of norm 1, the encoder is a copy, b_enc is 0 and b_dec is
    the geometric median of x.
    """
    rows = torch.randn(sae.W_dec.shape, generator=generator)
    sae.W_dec.copy_(normalize(rows, dim=-1))
    sae.W_enc.copy_(sae.W_dec)
    sae.b_enc.zero_()
    sae.b_dec.copy_(geometric_median(x))
    return sae
