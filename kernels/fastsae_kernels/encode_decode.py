"""A complete top-k sparse autoencoder as one op: encode, keep k, decode.

    values, indices = encode_topk(x, W_enc, b_enc, k, by)
    recon           = decode(values, indices, W_dec) + b_dec

It is one op because the rotation trick (rotation.py) needs the decoder for the encoder's gradient.
The decoder's gradient is that of decode. Shapes: N tokens, K kept, F latents, D and D_out widths
of x and of recon.
"""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import linear

from ._launch import check_devices, check_shape
from ._op import register
from .encode import check_encoder, encode_topk, straight_through
from .rotation import rotation_gradients, rotation_reference
from .sparse import decode, gather_dot, scatter_outer
from .topk import By, check_choice, topk_reference

Gradient = Literal["straight_through", "rotation_support", "rotation_dense"]

# --- reference: the specification -----------------------------------------------------------


def encode_decode_reference(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, k: int,
    by: By = "value", gradient: Gradient = "straight_through",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """[N, D], [F, D], [F], [F, D_out], [D_out] -> [N, D_out], [N, K], [N, K]"""
    h = linear(x, W_enc, b_enc)
    values, indices = topk_reference(h, k, by)
    q = torch.zeros_like(h).scatter(1, indices, values)
    if gradient != "straight_through":
        active, q = q != 0, q.detach()
        reached = active | (gradient == "rotation_dense")
        source = torch.where(reached, h, h.detach())
        rotated = torch.einsum("nij,nj->ni", rotation_reference(h, q).detach(), source)
        q = q + (rotated - rotated.detach()) * reached
        values = (q * active).gather(1, indices)
    return q @ W_dec + b_dec, values, indices


# --- autograd -------------------------------------------------------------------------------


class _EncodeDecode(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor,
        k: int, by: str, gradient: str,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        with torch.no_grad():
            values, indices = encode_topk(x, W_enc, b_enc, k, by)
            return decode(values, indices, W_dec) + b_dec, values, indices

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, values, indices = output
        ctx.save_for_backward(*inputs[:4], values, indices)
        ctx.mark_non_differentiable(indices)
        ctx.gradient = inputs[-1]

    @staticmethod
    def backward(ctx, d_recon, d_values, _):  # [N, D_out], [N, K]
        x, W_enc, b_enc, W_dec, values, indices = ctx.saved_tensors
        needs = ctx.needs_input_grad
        encoder = None, None, None
        if any(needs[:3]):
            if ctx.gradient == "straight_through":
                g = (d_values + gather_dot(d_recon, indices, W_dec)).where(values != 0, 0.0)
                encoder = straight_through(g, x, W_enc, indices, needs[:3])
            else:
                arguments = x, W_enc, b_enc, W_dec, values, indices, d_recon, d_values
                mode = ctx.gradient.removeprefix("rotation_")
                found = rotation_gradients(*arguments, mode, needs[:3])
                encoder = (t if need else None for t, need in zip(found, needs[:3], strict=True))
        return (
            *encoder,
            scatter_outer(values, indices, d_recon, W_dec.shape[0]) if needs[3] else None,
            d_recon.sum(0) if needs[4] else None,
            None,
            None,
            None,
        )


def _fake(x, W_enc, b_enc, W_dec, b_dec, k, by, gradient):
    N = x.shape[0]
    recon, values = x.new_empty(N, W_dec.shape[1]), x.new_empty(N, k)
    return recon, values, x.new_empty(N, k, dtype=torch.int64)


_encode_decode = register(_EncodeDecode, _fake)

# --- public ---------------------------------------------------------------------------------


def encode_decode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    k: int,
    by: By = "value",
    gradient: Gradient = "straight_through",
) -> tuple[Tensor, Tensor, Tensor]:
    """Encode tokens, keep the k largest pre-activations of each, and decode them.

    x [N, D] (already centered), W_enc [F, D], b_enc [F], W_dec [F, D_out], b_dec [D_out], one
    floating dtype -> recon [N, D_out], values [N, K] and indices [N, K] int64: bit for bit those of
    encode_topk, decode and + b_dec. Differentiable in all five; an entry of value 0 gets no
    gradient from its value. `gradient` selects the gradient of top-k:

    "straight_through"  the identity on active entries, as in encode_topk (arXiv:2406.04093)
    "rotation_support"  the gradient of active entries, rotated from codes to their pre-activations
    "rotation_dense"    the gradient of all latents, to all pre-activations (arXiv:2410.06424)

    The first is differentiable twice. Forward costs 2 N F D FLOPs; backward 8 N K D and for the
    rotations that of rotation_gradients. No more than FASTSAE_BUFFER_MB of pre-activations exist
    at a time. ValueError for wrong shapes, dtypes or choices, or unless 1 <= k <= F.
    """
    check_encoder(x, W_enc, b_enc, by)
    check_choice(k, by, W_enc.shape[0])
    check_shape("W_dec", W_dec, W_enc.shape[0], None)
    check_shape("b_dec", b_dec, W_dec.shape[1])
    if not x.dtype == W_dec.dtype == b_dec.dtype:
        raise ValueError(
            f"x, W_dec and b_dec must have one dtype, got {x.dtype}, {W_dec.dtype}, {b_dec.dtype}"
        )
    if gradient not in get_args(Gradient):
        raise ValueError(f"gradient must be one of {get_args(Gradient)}, got {gradient!r}")
    check_devices(x=x, W_dec=W_dec, b_dec=b_dec)
    return _encode_decode(x, W_enc, b_enc, W_dec, b_dec, k, by, gradient)
