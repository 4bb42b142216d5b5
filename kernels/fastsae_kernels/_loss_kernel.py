"""The kernel of loss.py: one program per token.

Shapes: N tokens, K active latents per token, F latents, D width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._latent_major_kernel import constants_for, load_rows
from ._launch import launch, power_of_2
from ._sparse_kernel import load_latents

# --- kernel: all tensors row-major ----------------------------------------------------------


@triton.jit
def _squared_error_kernel(
    v_ptr, i_ptr, W_ptr, b_ptr, target_ptr, sse_ptr, error_ptr, dots_ptr, F, K, D,
    RESIDENT: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    error = tl.load(b_ptr + d, mask=d < D, other=0.0).to(ACC)
    error -= tl.load(target_ptr + n * D + d, mask=d < D, other=0.0).to(ACC)
    if RESIDENT:
        k = tl.arange(0, BLOCK_K)
        f, exists = load_latents(i_ptr + n * K, k, K, F)  # pyright: ignore
        v = tl.load(v_ptr + n * K + k, mask=k < K, other=0.0).to(ACC)
        rows = load_rows(W_ptr, f, exists, d, D)
        error += tl.sum(v[:, None] * rows.to(ACC), axis=0)
        dots = tl.sum(rows.to(ACC) * error[None, :], axis=1)
        tl.store(dots_ptr + n * K + k, dots, mask=k < K)
    else:
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            f, exists = load_latents(i_ptr + n * K, k, K, F)  # pyright: ignore
            v = tl.load(v_ptr + n * K + k, mask=k < K, other=0.0).to(ACC)
            error += tl.sum(v[:, None] * load_rows(W_ptr, f, exists, d, D).to(ACC), axis=0)
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            f, exists = load_latents(i_ptr + n * K, k, K, F)  # pyright: ignore
            rows = load_rows(W_ptr, f, exists, d, D).to(ACC)
            tl.store(dots_ptr + n * K + k, tl.sum(rows * error[None, :], axis=1), mask=k < K)
    tl.store(sse_ptr + n, tl.sum(error * error))
    tl.store(error_ptr + n * D + d, error, mask=d < D)


# --- launcher -------------------------------------------------------------------------------


def launch_squared_error(
    values: Tensor, indices: Tensor, W: Tensor, b: Tensor, target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    (N, K), (F, D) = indices.shape, W.shape
    wide = torch.promote_types(W.dtype, torch.float32)
    sse, dots = W.new_empty(N, dtype=wide), W.new_empty(N, K, dtype=wide)
    error = W.new_empty(N, D)
    block_k, _, acc = constants_for(W)
    width = power_of_2(D)
    rows = power_of_2(K) * width * W.element_size()
    resident = rows <= 64 << 10
    launch(
        _squared_error_kernel,
        (N,),
        *(values, indices, W, b, target, sse, error, dots, F, K, D),
        *(resident, power_of_2(K) if resident else block_k, width, acc),
        num_warps=min(16, max(1, rows // 4096 if resident else width // 256)),
    )
    return sse, error, dots
