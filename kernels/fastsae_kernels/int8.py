"""An encoder GEMM in int8 for CPUs, which proposes candidates for encode_topk.

    scale[f] = max_d |c[d] W[f, d]| / 127, rounded up to 8 significant bits
    rows[f]  = round(c[d] W[f, d] / scale[f])
    int8_product(x, W, b)[f, n] = scale_W[f] * scale_x[n] * (rows_W[f] . rows_x[n]) + b[f]

where the rows and scales of x are those of x / c. The column factors c, powers of two, balance
dimensions of different size (SmoothQuant, arXiv:2211.10438): otherwise a few large dimensions would
leave hardly any levels to the others. Sums of int8 products are exact, so every implementation
gives the same bits. oneDNN needs one operand in a packed format. Packing the tokens is cheaper than
packing all latents after each step, so the result has one row per latent.
Shapes: N tokens, F latents, D model width.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import batch_norm

from .product import instructions

LARGEST = 127
SMALLEST_SCALE = 2.0**-100  # its inverse is normal in float32


class Int8Rows(NamedTuple):
    """A matrix in int8 with one scale per row and one factor per column."""

    rows: Tensor
    """int8 [F, D]"""
    scale: Tensor
    """float32 [F]"""
    columns: Tensor
    """float32 [D]: the factor of each column, applied before quantization."""


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
    """Column factors [D] for encoders of centered tokens x [N, D].

    Each is sqrt(mean over tokens of |x[n, d]| / max_d |x[n, d]|), rounded to a power of two. Tokens
    with NaN or Inf do not count.
    """
    x = x[x.isfinite().all(1)]
    if not len(x):
        return torch.ones(x.shape[1], device=x.device)
    largest = x.abs().amax(1, keepdim=True)
    share = (x / largest.clamp_min(SMALLEST_SCALE)).abs().float().mean(0)
    root = share.sqrt_().clamp_min_(2.0**-8)  # for dimensions that are (almost) always 0
    return torch.exp2(root.log2_().round_())


def quantize_int8(x: Tensor, columns: Tensor | None = None) -> Int8Rows:
    """Quantize floating rows [F, D] to 255 levels with one scale per row, exact in bfloat16.

    Columns are first multiplied by the factors `columns` [D], if given. A row with NaN or Inf gets
    a scale of NaN or Inf, and meaningless entries.
    """
    if columns is None:
        columns = torch.ones(x.shape[1], device=x.device)
    else:
        x = x * columns
    scale = x.abs().amax(1).float().div_(LARGEST).clamp_min_(SMALLEST_SCALE)
    scale = (scale.view(torch.int32) + 0xFFFF & ~0xFFFF).view(torch.float32)  # exact in bfloat16
    return Int8Rows((x / scale[:, None]).round_().to(torch.int8), scale, columns)


def unsigned(W: Int8Rows) -> Tensor:
    """The rows of W plus 128, in uint8 [F, D]: with VNNI, one operand of the GEMM must be unsigned
    (signed times signed is fast with AMX alone)."""
    return W.rows.view(torch.uint8) ^ 128


def int8_product(x: Tensor, W: Int8Rows, b: Tensor, shifted: Tensor | None = None) -> Tensor:
    """(x W^T + b)^T in int8: [N, D], [F, D], [F] -> bfloat16 [F, N].

    oneDNN multiplies on CPUs with VNNI or AMX; elsewhere it is emulated in float32. `shifted` is
    `unsigned(W)`, for callers that use W several times.
    """
    rows, scale, _ = quantize_int8(x / W.columns)
    if why_not_int8(x.device) is None:
        nothing = torch.zeros(len(x), dtype=torch.int32)
        shifted = unsigned(W) if shifted is None else shifted
        pre = torch.ops.onednn.qlinear_pointwise(
            shifted, 1.0, 128, torch.ops.onednn.qlinear_prepack(rows, None), scale, nothing, None,
            1.0, 0, torch.bfloat16, "none", [], "",
        )  # fmt: skip
    else:
        pre = torch.mm(W.rows.float(), rows.float().t()).mul_(scale).to(torch.bfloat16)
    if not len(x):
        return pre
    # W.scale * pre + b in a single pass, computed in float32: no pointwise operator does that.
    zeros, ones = torch.zeros_like(W.scale), torch.ones_like(W.scale)
    return batch_norm(pre[None], zeros, ones, W.scale, b.float(), eps=0.0)[0]


def why_not_int8(device: torch.device | str) -> str | None:
    """Why a device cannot run the int8 GEMM; None if it can."""
    if torch.device(device).type != "cpu":
        return "int8 is for CPUs"
    if not instructions() & {"avx512_vnni", "avx_vnni"}:
        return "int8 needs a processor with VNNI instructions"
    if not torch.backends.mkldnn.is_available():
        return "int8 needs a torch that is built with oneDNN"
    return None
