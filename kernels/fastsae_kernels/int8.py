"""A product of rows in int8 on a CPU, which proposes the candidates that encode.py ranks exactly.

    scale[f] = max_d |W[f, d]| / 127, rounded up to 8 significant bits
    rows[f]  = round(W[f] / scale[f])
    int8_product(x, W, b)[f, n] = scale_W[f] * scale_x[n] * (rows_W[f] . rows_x[n]) + b[f]

Sums of int8 products are exact, so that it does not matter who multiplies. oneDNN wants one of the
two operands packed: it gets the tokens, which are few, rather than all latents after each step.
Therefore the result has a row per latent.
Shapes: N tokens, F latents, D model width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .product import instructions

LARGEST = 127
SMALLEST_SCALE = 2.0**-100  # its inverse is normal in float32


class Int8Rows(NamedTuple):
    """A matrix in int8 with one scale per row."""

    rows: Tensor
    """int8 [F, D]"""
    scale: Tensor
    """float32 [F]"""


# --- reference: the specification -----------------------------------------------------------


def quantize_int8_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """Finite [F, D] -> int8 [F, D], float32 [F]"""
    scale = (x.abs().amax(1).float() / LARGEST).clamp_min(SMALLEST_SCALE)
    significand, exponent = torch.frexp(scale)
    scale = torch.ldexp((significand * 256).ceil() / 256, exponent)
    return (x.float() / scale[:, None]).round().to(torch.int8), scale


def int8_product_reference(x: Tensor, W: Int8Rows, b: Tensor) -> Tensor:
    """[N, D], [F, D], [F] -> [F, N]"""
    rows, scale = quantize_int8_reference(x)
    sums = W.rows.double() @ rows.double().t()
    return W.scale[:, None] * scale * sums + b[:, None]


# --- public ---------------------------------------------------------------------------------


def quantize_int8(x: Tensor) -> Int8Rows:
    """Round floating rows [F, D] to 255 levels, each with a scale of its own that bfloat16 holds.

    The scale of a row with NaN or Inf is NaN or Inf, and its rows mean nothing.
    """
    scale = x.abs().amax(1).float().div_(LARGEST).clamp_min_(SMALLEST_SCALE)
    scale = (scale.view(torch.int32) + 0xFFFF & ~0xFFFF).view(torch.float32)  # exact in bfloat16
    return Int8Rows((x / scale[:, None]).round_().to(torch.int8), scale)


def int8_product(x: Tensor, W: Int8Rows, b: Tensor) -> Tensor:
    """[N, D], [F, D], [F] -> bfloat16 [F, N], by oneDNN where the processor has VNNI or AMX.

    Elsewhere it is emulated in float32.
    """
    rows, scale = quantize_int8(x)
    if why_not_int8(x.device) is None:
        nothing = torch.zeros(len(x), dtype=torch.int32)
        pre = torch.ops.onednn.qlinear_pointwise(
            W.rows, 1.0, 0, torch.ops.onednn.qlinear_prepack(rows, None), scale, nothing, None,
            1.0, 0, torch.bfloat16, "none", [], "",
        )  # fmt: skip
    else:
        pre = torch.mm(W.rows.float(), rows.float().t()).mul_(scale).to(torch.bfloat16)
    low_scale, bias = W.scale[:, None].to(torch.bfloat16), b[:, None].to(torch.bfloat16)
    return pre.mul_(low_scale).add_(bias)  # of mixed dtypes they would take four times as long


def why_not_int8(device: torch.device | str) -> str | None:
    """What keeps a product from running in int8 there; None: nothing."""
    if torch.device(device).type != "cpu":
        return "int8 is for CPUs"
    if not instructions() & {"avx512_vnni", "avx_vnni"}:
        return "int8 needs a processor with VNNI instructions"
    if not torch.backends.mkldnn.is_available():
        return "int8 needs a torch that is built with oneDNN"
    return None
