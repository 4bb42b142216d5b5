"""The kernel of float8.py: each program quantizes one row to e4m3, reading it once.

Shapes: N rows, D columns.
"""

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch, power_of_2

if TYPE_CHECKING:
    from .float8 import Float8Rows

# --- kernel: all tensors row-major ----------------------------------------------------------


@triton.jit
def _round_e4m3(x):
    """Round to the nearest e4m3 number, ties to even, so that the following cast is exact.

    On a GPU the cast alone would do the same, but in Triton 3.7's interpreter it loses the carry.
    """
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & 0x7FF00000).to(tl.float32, bitcast=True)
    small = (tl.abs(x) + 16384.0) - 16384.0  # multiples of 2^-9, as subnormal numbers are
    magnitude = tl.where(tl.abs(x) < 0.015625, small, normal)
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def quantize_row(x):
    """Quantize a float32 row -> e4m3 and its scale, a power of two, whose inverse is exact.

    The bits of magnitudes, compared as integers, have the order of the numbers, with Inf and NaN
    above all; a row that contains these gets scale Inf.
    """
    largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    exponent = tl.maximum(largest >> 23, 34)  # of 2^-93, for a scale of 2^-100
    scale = tl.where(exponent < 255, (exponent - 7) << 23, 0x7F800000)
    row = _round_e4m3(x * ((261 - exponent) << 23).to(tl.float32, bitcast=True))
    return row.to(tl.float8e4nv), scale.to(tl.float32, bitcast=True)


@triton.jit
def _quantize_kernel(x_ptr, row_ptr, scale_ptr, D, BLOCK_D: tl.constexpr):
    """Quantize one row."""
    n = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    x = tl.load(x_ptr + n * D + d, mask=d < D, other=0.0).to(tl.float32)
    row, scale = quantize_row(x)  # pyright: ignore
    tl.store(row_ptr + n * D + d, row, mask=d < D)
    tl.store(scale_ptr + n, scale)


# --- launcher -------------------------------------------------------------------------------

COLUMNS = 16
"""Columns per thread: two 16-byte loads of bfloat16, one 16-byte store of e4m3."""


def warps_for_row(D: int) -> int:
    """Warps of a program that holds a row of D columns in registers."""
    return min(16, max(1, power_of_2(D) // (32 * COLUMNS)))


def launch_quantize(x: Tensor, out: "Float8Rows") -> None:
    """Quantize contiguous rows [F, D] into `out`."""
    N, D = x.shape
    launch(
        _quantize_kernel,
        (N,),
        *(x, out.rows, out.scale, D),
        BLOCK_D=power_of_2(D),
        num_warps=warps_for_row(D),
    )
