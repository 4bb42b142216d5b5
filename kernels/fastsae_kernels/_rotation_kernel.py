"""The kernel of rotation.py: one program per token computes its coefficients and its dx.

It sums |h|^2 and h . g over the columns of the matmuls' results, and computes a, p and u from them.
Then it loops over the columns again, which are still in the cache, and adds the rows of W_enc that
u picks, to write dx.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._latent_major_kernel import load_rows
from ._launch import launch, power_of_2
from ._sparse_kernel import load_latents

# --- kernel: all tensors row-major ----------------------------------------------------------


@triton.jit
def _load(ptr, d, D):
    return tl.load(ptr + d, mask=d < D, other=0.0)


@triton.jit
def _rotation_kernel(
    x_ptr, h_W_ptr, shift_ptr, bb_ptr, g_W_ptr, d_recon_ptr, shift_g_ptr,
    v_ptr, i_ptr, t_ptr, qq_ptr, qg_ptr, qt_ptr, W_ptr, a_ptr, p_ptr, u_ptr, F, K, D, D_OUT,
    NEED_X: tl.constexpr, MOST_K: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, STAGES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Coefficients of one token, as in _coefficients of _rotation_backward.py, then dx."""
    n = tl.program_id(0).to(tl.int64)
    x_ptr, h_W_ptr = x_ptr + n * D, h_W_ptr + n * D
    v_ptr, i_ptr, t_ptr, u_ptr = v_ptr + n * K, i_ptr + n * K, t_ptr + n * K, u_ptr + n * K
    g_W_ptr, d_recon_ptr = g_W_ptr + n * D, d_recon_ptr + n * D_OUT

    hh_parts, hg_parts = tl.zeros((BLOCK_D,), dtype=ACC), tl.zeros((BLOCK_D,), dtype=ACC)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        x = _load(x_ptr, d, D)
        hh_parts += x * (_load(h_W_ptr, d, D) + _load(shift_ptr, d, D))
        hg_parts += x * _load(g_W_ptr, d, D)
    for first in range(0, D_OUT, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        hg_parts += _load(d_recon_ptr, d, D_OUT) * _load(shift_g_ptr, d, D_OUT)
    hh = tl.sum(hh_parts) + tl.load(bb_ptr)
    hg = tl.sum(hg_parts) + tl.load(qt_ptr + n)

    qq, qg = tl.load(qq_ptr + n), tl.load(qg_ptr + n)
    none = qq == 0
    q = tl.sqrt(tl.where(none, 1.0, qq))
    hh = tl.maximum(hh, qq, propagate_nan=tl.PropagateNan.ALL)
    h = tl.sqrt(tl.where(none, 1.0, hh))
    a = tl.where(none, 0.0, q / h)
    s = (hg / h + qg / q) / (1 + a)
    p, c = a * (2 * qg / q - s) / h, -a * s / q
    tl.store(a_ptr + n, a)
    tl.store(p_ptr + n, p)
    for first in range(0, K, MOST_K):
        k = first + tl.arange(0, MOST_K)
        tl.store(u_ptr + k, a * _load(t_ptr, k, K) + c * _load(v_ptr, k, K), mask=k < K)

    if NEED_X:
        # With up to 32 columns, every warp computes the whole row: none may overwrite h_W before
        # all have read it.
        tl.debug_barrier()
        for first in range(0, D, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)
            dx = p * _load(h_W_ptr, d, D) + a * _load(g_W_ptr, d, D)
            for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
                k = start + tl.arange(0, BLOCK_K)
                f, exists = load_latents(i_ptr, k, K, F)  # pyright: ignore
                u = a * _load(t_ptr, k, K) + c * _load(v_ptr, k, K)
                dx += tl.sum(u[:, None] * load_rows(W_ptr, f, exists, d, D), axis=0)
            tl.store(h_W_ptr + d, dx, mask=d < D)


# --- launcher -------------------------------------------------------------------------------

BLOCK = 4, 1024
"""Rows of W_enc and columns per iteration: sums over rows stay within a thread."""

STAGES = 3
"""Two blocks of rows are loaded while one is added, if rows are aligned. Otherwise they would be
copied 4 bytes at a time, which is not faster."""


def launch_rotation(
    x: Tensor,
    W_enc: Tensor,
    h_terms: tuple[Tensor, Tensor, Tensor],
    g_terms: tuple[Tensor, Tensor, Tensor],
    code: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    need_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients a, p [N, 1] and u [N, K], from the Terms and the Code of _rotation_backward.py.

    Overwrites h W_enc, the first of h_terms, with dx if that is needed.
    """
    values, indices, t, qq, qg, qt = code
    (N, K), (F, D) = indices.shape, W_enc.shape
    h_W, shift, bb = h_terms
    g_W, d_recon, shift_g = g_terms
    a, p, u = x.new_empty(N, 1), x.new_empty(N, 1), x.new_empty(N, K)
    rows, columns = BLOCK
    launch(
        _rotation_kernel,
        (N,),
        *(x, h_W, shift, bb, g_W, d_recon, shift_g),
        *(values, indices, t, qq, qg, qt, W_enc, a, p, u),
        *(F, K, D, d_recon.shape[1]),
        NEED_X=need_x,
        MOST_K=min(128, power_of_2(K)),
        BLOCK_K=rows,
        BLOCK_D=min(columns, power_of_2(D)),
        STAGES=1 if D % 16 else STAGES,
        ACC=tl.float64 if x.dtype == torch.float64 else tl.float32,
        num_warps=4,
    )
    return a, p, u
