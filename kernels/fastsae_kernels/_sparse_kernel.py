"""The kernels of sparse.py: one program per token, in decode also per block of columns.

Shapes: N tokens, K active latents per token, F latents, D model width.
"""

import triton
import triton.language as tl
from torch import Tensor

from ._latent_major_kernel import constants_for, launch_blocks, load_rows
from ._launch import launch

# --- kernels: all tensors row-major ---------------------------------------------------------


@triton.jit
def load_latents(i_ptr, k, K, F):
    """Latents at positions k of a token's code, and a mask of those in [0, F): [BLOCK_K] each"""
    f = tl.load(i_ptr + k, mask=k < K, other=-1)
    return f, (f >= 0) & (f < F)


@triton.jit
def _decode_kernel(
    v_ptr, i_ptr, W_ptr, out_ptr, F, K, D,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Some columns of one token's reconstruction."""
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_D,), dtype=ACC)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        f, exists = load_latents(i_ptr + n * K, k, K, F)  # pyright: ignore
        v = tl.load(v_ptr + n * K + k, mask=k < K, other=0.0).to(ACC)
        acc += tl.sum(v[:, None] * load_rows(W_ptr, f, exists, d, D).to(ACC), axis=0)
    tl.store(out_ptr + n * D + d, acc, mask=d < D)


@triton.jit
def _gather_dot_kernel(
    x_ptr, i_ptr, W_ptr, out_ptr, F, K, D,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """All dot products of one token."""
    n = tl.program_id(0).to(tl.int64)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        f, exists = load_latents(i_ptr + n * K, k, K, F)  # pyright: ignore
        acc = tl.zeros((BLOCK_K, BLOCK_D), dtype=ACC)
        for column in range(0, D, BLOCK_D):
            d = column + tl.arange(0, BLOCK_D)
            x = tl.load(x_ptr + n * D + d, mask=d < D, other=0.0).to(ACC)
            acc += x[None, :] * load_rows(W_ptr, f, exists, d, D).to(ACC)
        tl.store(out_ptr + n * K + k, tl.sum(acc, axis=1), mask=k < K)


# --- launchers ------------------------------------------------------------------------------


def launch_decode(values: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    """[N, K], [N, K], [F, D] -> [N, D]"""
    (N, K), F = indices.shape, W.shape[0]
    out = W.new_empty(N, W.shape[1])
    launch_blocks(_decode_kernel, N, values, indices, W, out, F, K, x=W)
    return out


def launch_gather_dot(x: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    """[N, D], [N, K], [F, D] -> [N, K]"""
    (N, K), (F, D) = indices.shape, W.shape
    out = x.new_empty(N, K)
    constants = constants_for(x)._asdict()
    launch(_gather_dot_kernel, (N,), x, indices, W, out, F, K, D, **constants)
    return out
