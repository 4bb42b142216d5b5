"""Corrects the values of active latents by what their reconstruction leaves of the input.

An encoder reads each value off the input as if no other latent were active. Where active latents
overlap, the values count what they share several times. One correction is a step of steepest
descent on the squared error in the values of the active latents, as far as the error falls:

    r = x - z W_dec        g = r W_dec^T on active latents, else 0
    z <- z + |g|^2 / |g W_dec|^2 g

Values that may not be negative go as far along g as all stay at least 0, and one that is 0 only
up: clipping afterwards could raise the error. Latents and weights stay as they are. It costs two
decodes and a gather_dot, and many corrections lead to the least-squares values of the active
latents.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from fastsae.codes import Codes
from fastsae_kernels import decode, gather_dot

from .activation import Inputs, Weights


def corrected(codes: Codes, x: Inputs, weights: Weights, steps: int, signed: bool) -> Codes:
    """Codes after `steps` corrections toward centered inputs; unless signed, values stay at least
    0, and some may become 0. The codes are sparse."""
    shards, latents, active = weights.shards, codes.latents(), codes.active

    def decoded(values: Tensor) -> Tensor:
        return shards.spread(shards.total(decode(values, latents, weights.W_dec)))

    values = codes.values
    for _ in range(steps):
        left = x - decoded(values)
        step = gather_dot(left, latents, weights.W_dec).where(active, 0.0)
        if not signed:
            step = step.where((values > 0) | (step > 0), 0.0)
        change = decoded(step)
        steepness, curvature = shards.spread(shards.total(squares(step))), squares(change)
        length = steepness / curvature.where(curvature > 0, 1.0)  # if it is 0, so is the other
        if not signed:
            room = (values / -step.where(step < 0, -1.0)).where(step < 0, torch.inf)
            length = length.minimum(shards.smallest(room.amin(1, keepdim=True)))
        before, values = values, values + length.to(values) * step
        if not signed:  # what rounding leaves of a value that becomes 0 would end the next step
            least = 4 * torch.finfo(values.dtype).eps * before
            values = values.where(values > least, 0.0)
    return codes._replace(values=values)


def squares(rows: Float[Tensor, "N M"]) -> Float[Tensor, "N 1"]:
    """The squared norm of each row, at least in float32: half precision overflows."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return wide.square().sum(1, keepdim=True)
