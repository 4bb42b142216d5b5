"""The kernel of rescore.py: one program per token computes its candidates' values and ranks them.

A candidate's rank is the number of candidates before it: C^2 comparisons instead of a sort. The
first k are stored at the position of their rank.
Shapes: N tokens, C candidates per token, K kept, F latents, D model width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._latent_major_kernel import constants_for, load_rows
from ._launch import launch
from ._sparse_kernel import load_latents
from ._topk_kernel import sort_key
from .topk import By

TILE = 32
"""Candidates that are compared with as many others at a time; more would need too many registers.
"""

# --- kernel: all tensors row-major ----------------------------------------------------------


@triton.jit
def _load_candidates(h_ptr, i_ptr, c, C, ABS: tl.constexpr):
    """Values, sort keys and latents of candidates: [TILE] -> [TILE], [TILE], [TILE]"""
    h = tl.load(h_ptr + c, mask=c < C, other=0.0)
    f = tl.load(i_ptr + c, mask=c < C, other=0).to(tl.int32)
    return h, sort_key(tl.abs(h) if ABS else h, 0), f


@triton.jit
def _rescore_kernel(
    x_ptr, i_ptr, W_ptr, b_ptr, h_ptr, value_ptr, index_ptr, F, C, K, D,
    ABS: tl.constexpr, TILE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Compute a token's candidates h, then rank them and store the first K."""
    n = tl.program_id(0).to(tl.int64)
    h_ptr += n * C
    i_ptr += n * C
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        f, exists = load_latents(i_ptr, c, C, F)  # pyright: ignore
        acc = tl.zeros((BLOCK_C, BLOCK_D), dtype=ACC)
        for column in range(0, D, BLOCK_D):
            d = column + tl.arange(0, BLOCK_D)
            x = tl.load(x_ptr + n * D + d, mask=d < D, other=0.0).to(ACC)
            acc += x[None, :] * load_rows(W_ptr, f, exists, d, D).to(ACC)
        h = tl.sum(acc, axis=1) + tl.load(b_ptr + f, mask=exists, other=0.0).to(ACC)
        tl.store(h_ptr + c, h, mask=c < C)
    tl.debug_barrier()  # every thread reads all values below
    for start in range(0, C, TILE):
        c = start + tl.arange(0, TILE)
        h, key, f = _load_candidates(h_ptr, i_ptr, c, C, ABS)  # pyright: ignore
        place = tl.zeros((TILE,), dtype=tl.int32)
        for other in range(0, C, TILE):
            rival = other + tl.arange(0, TILE)
            _, rivals, latents = _load_candidates(h_ptr, i_ptr, rival, C, ABS)  # pyright: ignore
            above = rivals[None, :] > key[:, None]
            lower = (rivals[None, :] == key[:, None]) & (latents[None, :] < f[:, None])
            place += tl.sum(((above | lower) & (rival < C)[None, :]).to(tl.int32), axis=1)
        kept = (c < C) & (place < K)
        if not ABS:
            h = tl.where(h < 0, 0.0, h)
        tl.store(value_ptr + n * K + place, h, mask=kept)
        tl.store(index_ptr + n * K + place, f, mask=kept)


# --- launcher -------------------------------------------------------------------------------


def launch_rescore(
    x: Tensor, W: Tensor, b: Tensor, candidates: Tensor, k: int, by: By
) -> tuple[Tensor, Tensor]:
    """[N, D], [F, D], [F], [N, C] -> values [N, K], indices [N, K]"""
    (N, C), (F, D) = candidates.shape, W.shape
    constants = constants_for(x)
    h = torch.empty(N, C, dtype=torch.float32, device=x.device)
    values, indices = x.new_empty(N, k), candidates.new_empty(N, k)
    launch(
        _rescore_kernel,
        (N,),
        *(x, candidates.contiguous(), W, b.contiguous(), h, values, indices, F, C, k, D),
        ABS=by == "abs",
        TILE=TILE,
        BLOCK_C=constants.BLOCK_K,
        BLOCK_D=constants.BLOCK_D,
        ACC=constants.ACC,
    )
    return values, indices
