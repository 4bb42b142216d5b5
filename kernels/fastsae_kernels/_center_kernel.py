"""The kernels of center.py: one pass over x, then one over the statistics of its blocks.

A program loops over tiles of rows of some columns, and keeps each column's mean and the sum of
squares around it. Such statistics can be merged without cancellation (Chan, Golub and LeVeque,
1983), even if the mean is large; sums of x and x^2 would lose all digits of a variance 1e7 times
smaller than the squared mean. Means are relative to the first token, which makes them as small as
the spread; if that token is an outlier, rounding them costs a digit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch, power_of_2, wide_dtype

# --- kernels: all tensors row-major ---------------------------------------------------------


@triton.jit
def _merge(count, mean, squares, n, means):
    """Merge R groups of n [R] rows with means [R, C] into mean and squares [C] of `count` rows.

    The caller adds the groups' own squares around their means.
    """
    more = tl.sum(n, axis=0)
    center = tl.sum(n[:, None] * means, axis=0) / more
    distance = means - center[None, :]
    share, step = more / (count + more), center - mean
    squares += tl.sum(n[:, None] * distance * distance, axis=0)
    squares += step * step * (count * share)
    return mean + step * share, squares


@triton.jit
def _center_kernel(
    x_ptr, b_ptr, out_ptr, mean_ptr, squares_ptr, N, D,
    ROWS: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Write x - b, and the mean and squares of each column over a program's rows."""
    block = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    b = tl.load(b_ptr + d, mask=d < D, other=0.0).to(ACC)
    origin = tl.load(x_ptr + d, mask=d < D, other=0.0).to(ACC)
    mean, squares = tl.zeros((COLUMNS,), dtype=ACC), tl.zeros((COLUMNS,), dtype=ACC)
    for first in range(block * ROWS, tl.minimum((block + 1) * ROWS, N), TILE):
        n = first + tl.arange(0, TILE)
        place = n[:, None] * D + d[None, :]
        inside = (n < N)[:, None] & (d < D)[None, :]
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(ACC)
        tl.store(out_ptr + place, x - b[None, :], mask=inside)
        before = 1.0 * (first - block * ROWS)
        mean, squares = _merge(  # pyright: ignore[reportGeneralTypeIssues]
            before, mean, squares, (n < N).to(ACC), x - origin[None, :]
        )
    tl.store(mean_ptr + block * D + d, mean, mask=d < D)
    tl.store(squares_ptr + block * D + d, squares, mask=d < D)


@triton.jit
def _total_variance_kernel(
    mean_ptr, squares_ptr, out_ptr, N, D,
    ROWS: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Merge the statistics of all blocks, and sum the squares of a program's columns."""
    d = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mean, squares = tl.zeros((COLUMNS,), dtype=ACC), tl.zeros((COLUMNS,), dtype=ACC)
    blocks = tl.cdiv(N, ROWS)
    for first in range(0, blocks, TILE):
        block = first + tl.arange(0, TILE)
        place = block.to(tl.int64)[:, None] * D + d[None, :]
        inside = (block < blocks)[:, None] & (d < D)[None, :]
        n = tl.maximum(tl.minimum(N - block * ROWS, ROWS), 0).to(ACC)
        means = tl.load(mean_ptr + place, mask=inside, other=0.0).to(ACC)
        squares += tl.sum(tl.load(squares_ptr + place, mask=inside, other=0.0).to(ACC), axis=0)
        before = 1.0 * first * ROWS
        mean, squares = _merge(  # pyright: ignore[reportGeneralTypeIssues]
            before, mean, squares, n, means
        )
    tl.store(out_ptr + tl.program_id(0), tl.sum(squares))


# --- launcher -------------------------------------------------------------------------------

ROWS = 64
"""Rows per program: the statistics that it writes are 1/50 of its memory traffic."""

BLOCK = 8, 256
"""Rows and columns of a tile. The threads of a warp are side by side, with 16 bytes each, so that
sums over rows stay within a thread; 256 divides 768."""

MERGED = 32, 32
"""The same for the second pass: narrow tiles, to have programs for many multiprocessors."""


def launch_center(x: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Contiguous [N, D], [D] -> x - b [N, D] in dtype, total variance []"""
    N, D = x.shape
    wide = wide_dtype(x)
    out = torch.empty(N, D, dtype=dtype, device=x.device)
    mean, squares = (x.new_empty(-(-N // ROWS), D, dtype=wide) for _ in range(2))
    (rows, columns), (blocks, narrow) = BLOCK, MERGED
    columns = min(columns, power_of_2(D))
    launch(
        _center_kernel,
        (len(mean), -(-D // columns)),
        *(x, b, out, mean, squares, N, D),
        ROWS=ROWS,
        TILE=rows,
        COLUMNS=columns,
        ACC=tl.float64 if wide == torch.float64 else tl.float32,
        num_warps=max(1, columns * x.element_size() // (16 * 32)),
    )
    sums = x.new_empty(-(-D // narrow), dtype=torch.float64)
    launch(
        _total_variance_kernel,
        (len(sums),),
        *(mean, squares, sums, N, D),
        ROWS=ROWS,
        TILE=blocks,
        COLUMNS=narrow,
        ACC=tl.float64,  # cheap: there is little to add up
        num_warps=1,
    )
    return out, sums.sum().to(wide)
