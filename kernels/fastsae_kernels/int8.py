"""A product of rows in int8 on a CPU, which proposes the candidates that encode.py ranks exactly.

    scale[f] = max_d |c[d] W[f, d]| / 127, rounded up to 8 significant bits
    rows[f]  = round(c[d] W[f, d] / scale[f])
    int8_product(x, W, b)[f, n] = scale_W[f] * scale_x[n] * (rows_W[f] . rows_x[n]) + b[f]

where the rows and scales of x are those of x / c. Columns c of powers of two even out dimensions
of different sizes (SmoothQuant, arXiv:2211.10438): else a few large ones leave no levels to the
others. Sums of int8 products are exact, so that it does not matter who multiplies. oneDNN wants
one of the two operands packed: it gets the tokens, which are few, rather than all latents after
each step. Therefore the result has a row per latent.
Shapes: N tokens, F latents, D model width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .product import instructions

LARGEST = 127
SMALLEST_SCALE = 2.0**-100  # its inverse is normal in float32


class Int8Rows(NamedTuple):
    """A matrix in int8 with one scale per row, and the factors of its columns."""

    rows: Tensor
    """int8 [F, D]"""
    scale: Tensor
    """float32 [F]"""
    columns: Tensor
    """float32 [D]: what each column was multiplied by before."""


# --- reference: the specification -----------------------------------------------------------


def quantize_int8_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """Finite [F, D] -> int8 [F, D], float32 [F]"""
    scale = (x.abs().amax(1).float() / LARGEST).clamp_min(SMALLEST_SCALE)
    significand, exponent = torch.frexp(scale)
    scale = torch.ldexp((significand * 256).ceil() / 256, exponent)
    return (x.float() / scale[:, None]).round().to(torch.int8), scale


def int8_product_reference(x: Tensor, W: Int8Rows, b: Tensor) -> Tensor:
    """[N, D], [F, D], [F] -> [F, N]"""
    rows, scale = quantize_int8_reference(x / W.columns)
    sums = W.rows.double() @ rows.double().t()
    return W.scale[:, None] * scale * sums + b[:, None]


# --- public ---------------------------------------------------------------------------------


def balance(x: Tensor) -> Tensor:
    """Columns [D] for encoders of centered tokens x [N, D]: each the root of the mean share that
    a dimension has of a token's largest entry, to the nearest power of two. Tokens with NaN or Inf
    do not count."""
    x = x[x.isfinite().all(1)]
    if not len(x):
        return torch.ones(x.shape[1], device=x.device)
    largest = x.abs().amax(1, keepdim=True)
    share = (x / largest.clamp_min(SMALLEST_SCALE)).abs().float().mean(0)
    root = share.sqrt_().clamp_min_(2.0**-8)  # of a dimension that is 0 as well
    return torch.exp2(root.log2_().round_())


def quantize_int8(x: Tensor, columns: Tensor | None = None) -> Int8Rows:
    """Round floating rows [F, D] to 255 levels, each with a scale of its own that bfloat16 holds;
    before, multiply the columns by `columns` [D], if given.

    The scale of a row with NaN or Inf is NaN or Inf, and its rows mean nothing.
    """
    if columns is None:
        columns = torch.ones(x.shape[1], device=x.device)
    else:
        x = x * columns
    scale = x.abs().amax(1).float().div_(LARGEST).clamp_min_(SMALLEST_SCALE)
    scale = (scale.view(torch.int32) + 0xFFFF & ~0xFFFF).view(torch.float32)  # exact in bfloat16
    return Int8Rows((x / scale[:, None]).round_().to(torch.int8), scale, columns)


def int8_product(x: Tensor, W: Int8Rows, b: Tensor) -> Tensor:
    """[N, D], [F, D], [F] -> bfloat16 [F, N], by oneDNN where the processor has VNNI or AMX.

    Elsewhere it is emulated in float32.
    """
    rows, scale, _ = quantize_int8(x / W.columns)
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
