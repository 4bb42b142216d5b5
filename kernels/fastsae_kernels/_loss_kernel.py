"""The kernel of loss.py: one program per token loops over the columns of the rows it picks.

A block of columns of all K rows stays in registers between its two uses, so each row is read once,
for any D. More than 256 rows do not fit: they are read block by block, and again for the dot
products, while they are still in the L2 cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._latent_major_kernel import load_rows
from ._launch import launch, power_of_2, wide_dtype
from ._sparse_kernel import load_latents

# --- kernel: all tensors row-major ----------------------------------------------------------


@triton.jit
def _load_code(v_ptr, i_ptr, W_ptr, k, d, F, K, D, ACC: tl.constexpr):
    """Values of a token's code at places k and columns d of the rows it picks there."""
    f, exists = load_latents(i_ptr, k, K, F)  # pyright: ignore[reportGeneralTypeIssues]
    v = tl.load(v_ptr + k, mask=k < K, other=0.0).to(ACC)
    return v, load_rows(W_ptr, f, exists, d, D).to(ACC)


@triton.jit
def _squared_error_kernel(
    v_ptr, i_ptr, W_ptr, b_ptr, target_ptr, sse_ptr, error_ptr, dots_ptr, F, K, D,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, RESIDENT: tl.constexpr, STAGES: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Error, its square and dots of one token; RESIDENT keeps its rows of W in registers."""
    n = tl.program_id(0).to(tl.int64)
    v_ptr, i_ptr, dots_ptr = v_ptr + n * K, i_ptr + n * K, dots_ptr + n * K
    k = tl.arange(0, BLOCK_K)
    dots = tl.zeros((BLOCK_K,), dtype=ACC)
    sse = tl.zeros((BLOCK_D,), dtype=ACC)
    for start in tl.range(0, D, BLOCK_D, num_stages=STAGES if RESIDENT else 1):
        d = start + tl.arange(0, BLOCK_D)
        error = tl.load(b_ptr + d, mask=d < D, other=0.0).to(ACC)
        error -= tl.load(
            target_ptr + n * D + d, mask=d < D, other=0.0, eviction_policy="evict_first"
        ).to(ACC)
        if RESIDENT:
            v, rows = _load_code(v_ptr, i_ptr, W_ptr, k, d, F, K, D, ACC)  # pyright: ignore
            error += tl.sum(v[:, None] * rows, axis=0)
        else:
            for first in tl.range(0, K, BLOCK_K, num_stages=STAGES):
                v, rows = _load_code(v_ptr, i_ptr, W_ptr, first + k, d, F, K, D, ACC)  # pyright: ignore
                error += tl.sum(v[:, None] * rows, axis=0)
        # Beyond the last column, an infinite value times 0 is NaN.
        error = tl.where(d < D, error, 0.0)
        if RESIDENT:
            dots += tl.sum(rows * error[None, :], axis=1)
        else:
            for first in tl.range(0, K, BLOCK_K, num_stages=STAGES):
                _, rows = _load_code(v_ptr, i_ptr, W_ptr, first + k, d, F, K, D, ACC)  # pyright: ignore
                places, inside = dots_ptr + first + k, first + k < K
                before = tl.load(places, mask=inside & (start > 0), other=0.0)
                tl.store(places, before + tl.sum(rows * error[None, :], axis=1), mask=inside)
            tl.debug_barrier()  # the next block adds to dots that other threads may have stored
        sse += error * error
        tl.store(error_ptr + n * D + d, error, mask=d < D)
    if RESIDENT:
        tl.store(dots_ptr + k, dots, mask=k < K)
    tl.store(sse_ptr + n, tl.sum(sse))


# --- launcher -------------------------------------------------------------------------------

BLOCKS = {256: 32, 128: 64, 64: 64, 32: 128, 16: 256, 8: 512}
"""Columns of a block, by its number of rows: 32 or 64 entries for each thread of 4 warps, so that
three to seven programs share a multiprocessor. Up to 128 rows, a block's part of a bf16 row is at
least a cache line."""

BLOCK = 32, 64
"""Rows and columns of a block for tokens with more active latents than that."""

STAGES = 3
"""Two blocks are loaded while one is used. Unaligned rows cannot be copied 16 bytes at a time, and
their addresses would take too many registers: they use one stage."""


def launch_squared_error(
    values: Tensor, indices: Tensor, W: Tensor, b: Tensor, target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """[N, K], [N, K], [F, D], [D], [N, D] -> sse [N], error [N, D], dots [N, K]"""
    (N, K), (F, D) = indices.shape, W.shape
    wide = wide_dtype(W)
    sse, dots = W.new_empty(N, dtype=wide), W.new_empty(N, K, dtype=wide)
    error = W.new_empty(N, D)
    rows, columns = BLOCK if max(BLOCKS) < K else (power_of_2(K), BLOCKS[max(8, power_of_2(K))])
    columns = min(columns, power_of_2(D))
    launch(
        _squared_error_kernel,
        (N,),
        *(values, indices, W, b, target, sse, error, dots, F, K, D),
        BLOCK_K=rows,
        BLOCK_D=columns,
        RESIDENT=rows >= K,
        STAGES=1 if D % 16 else STAGES,
        ACC=tl.float64 if wide == torch.float64 else tl.float32,
        num_warps=min(4, max(1, rows * columns // 1024)),
    )
    return sse, error, dots
