"""The kernels of rational.py, for h as a matrix [R, C], to which shift is broadcast by two strides.

The backward kernel evaluates P, S and their derivatives again. Each program sums its entries'
contributions to the gradients of a, b, c_in and c_out; a second pass sums over programs in a fixed
order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch, power_of_2, wide_dtype
from .rational import Scalars

# --- kernels: h and what has its shape are row-major ----------------------------------------


@triton.jit
def _load_shifted(
    h_ptr, shift_ptr, R, C, shift_row, shift_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACROSS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """This program's tile of h - shift, its offsets in memory, and the mask of its entries."""
    tiles = tl.cdiv(C, COLUMNS)
    row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS
    column = (tl.program_id(0) % tiles).to(tl.int64) * COLUMNS
    r, c = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    inside = (r < R - row) & (c < C - column)
    offset = row * C + column + (r * C + c)
    h = tl.load(h_ptr + offset, mask=inside, other=0.0).to(ACC)
    if ACROSS:
        place = (row + r) * shift_row + (column + c) * shift_column
        shift = tl.load(shift_ptr + place, mask=inside, other=0.0)
    else:
        shift = tl.load(shift_ptr + (row + r) * shift_row, mask=r < R - row, other=0.0)
    return h - shift.to(ACC), offset, inside


@triton.jit
def _polynomial_and_slope(c_ptr, t, COUNT: tl.constexpr, ACC: tl.constexpr):
    """sum_i c[i] t^i and its derivative"""
    value = tl.zeros_like(t) + tl.load(c_ptr + COUNT - 1).to(ACC)
    slope = tl.zeros_like(t)
    for i in tl.static_range(2, COUNT + 1):  # pyright: ignore[reportGeneralTypeIssues]
        slope = slope * t + value
        value = value * t + tl.load(c_ptr + COUNT - i).to(ACC)
    return value, slope


@triton.jit
def _store_moments(out_ptr, w, t, COUNT: tl.constexpr):
    """Sums of w t^i for i below COUNT"""
    for i in tl.static_range(COUNT):  # pyright: ignore[reportGeneralTypeIssues]
        tl.store(out_ptr + i, tl.sum(w))
        w *= t


@triton.jit
def _rational_kernel(
    h_ptr, shift_ptr, a_ptr, b_ptr, c_in_ptr, c_out_ptr, out_ptr, R, C, shift_row, shift_column,
    A: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ACROSS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One tile of c_out P / Q."""
    x, offset, inside = _load_shifted(  # pyright: ignore[reportGeneralTypeIssues]
        h_ptr, shift_ptr, R, C, shift_row, shift_column, ROWS, COLUMNS, ACROSS, ACC
    )
    c_in, c_out = tl.load(c_in_ptr).to(ACC), tl.load(c_out_ptr).to(ACC)
    t = tl.clamp(x / c_in, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
    P, _ = _polynomial_and_slope(a_ptr, t, A, ACC)
    S, _ = _polynomial_and_slope(b_ptr, t, B, ACC)  # S / t
    tl.store(out_ptr + offset, c_out * P / (1 + tl.abs(S * t)), mask=inside)


@triton.jit
def _rational_backward_kernel(
    h_ptr, shift_ptr, a_ptr, b_ptr, c_in_ptr, c_out_ptr, g_ptr, dh_ptr, sums_ptr,
    R, C, shift_row, shift_column,
    A: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ACROSS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One tile of dh, and its sums for the gradients of a, b, c_in and c_out."""
    x, offset, inside = _load_shifted(  # pyright: ignore[reportGeneralTypeIssues]
        h_ptr, shift_ptr, R, C, shift_row, shift_column, ROWS, COLUMNS, ACROSS, ACC
    )
    g = tl.load(g_ptr + offset, mask=inside, other=0.0).to(ACC)
    c_in, c_out = tl.load(c_in_ptr).to(ACC), tl.load(c_out_ptr).to(ACC)
    t = tl.clamp(x / c_in, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
    P, P_slope = _polynomial_and_slope(a_ptr, t, A, ACC)
    S, S_slope = _polynomial_and_slope(b_ptr, t, B, ACC)  # S / t
    S, S_slope = S * t, S_slope * t + S
    inverse = 1 / (1 + tl.abs(S))
    r = P * inverse
    signed_r = tl.where(S > 0, r, tl.where(S < 0, -r, 0.0))
    w = g * c_out * inverse
    d = w * (P_slope - signed_r * S_slope) / c_in
    d = tl.where(tl.abs(x) <= tl.abs(c_in), d, 0.0)
    tl.store(dh_ptr + offset, d, mask=inside)
    sums_ptr += tl.program_id(0).to(tl.int64) * (A + B + 2)
    _store_moments(sums_ptr, w, t, A)
    _store_moments(sums_ptr + A, -w * signed_r * t, t, B)
    tl.store(sums_ptr + A + B, -tl.sum(d * t))
    tl.store(sums_ptr + A + B + 1, tl.sum(g * r))


# --- launchers ------------------------------------------------------------------------------

BLOCK, BACKWARD_BLOCK = 1024, 512
"""Entries per program: as many as fit in registers."""

WARPS = 1
"""With one warp, a program's sums need no shared memory and no barriers."""


def tile(shape: torch.Size, block: int) -> tuple[int, int, int]:
    """Rows and columns of a program's tile, and how many programs there are."""
    R, C = shape
    columns = min(block, power_of_2(C))
    rows = block // columns
    return rows, columns, -(-R // rows) * -(-C // columns)


def _launch(kernel, block: int, h: Tensor, shift: Tensor, scalars: Scalars, *tensors: Tensor):
    """One program per tile; both kernels have these arguments in common."""
    rows, columns, programs = tile(h.shape, block)
    launch(
        kernel,
        (programs,),
        *(h, shift, *scalars, *tensors, *h.shape, *shift.stride()),
        A=len(scalars[0]),
        B=len(scalars[1]),
        ROWS=rows,
        COLUMNS=columns,
        ACROSS=shift.stride(1) != 0,
        ACC=tl.float64 if h.dtype == torch.float64 else tl.float32,
        num_warps=WARPS,
    )


def launch_rational(h: Tensor, shift: Tensor, scalars: Scalars, out: Tensor) -> None:
    """Contiguous h [R, C], strided shift [R, C], a to c_out, contiguous out [R, C]"""
    _launch(_rational_kernel, BLOCK, h, shift, scalars, out)


def launch_rational_backward(
    g: Tensor, h: Tensor, shift: Tensor, scalars: Scalars, dh: Tensor
) -> Tensor:
    """The same -> gradients of a to c_out: [p + q + 3]"""
    programs, width = tile(h.shape, BACKWARD_BLOCK)[2], len(scalars[0]) + len(scalars[1]) + 2
    sums = torch.empty(programs, width, dtype=wide_dtype(h), device=h.device)
    _launch(_rational_backward_kernel, BACKWARD_BLOCK, h, shift, scalars, g, dh, sums)
    return sums.sum(0)
