"""The encoder GEMM with fused group maxima, which are computed in registers.

A tile of the product has BLOCK_F latents; group s of its S groups has every S-th of them, starting
with s. This matches the layout of tensor cores' results: most of a group's entries are in one
thread. Maxima are taken after rounding, so that they equal the entries that top-k reads.
Shapes: N tokens, F latents, D width, M = S * ceil(F / BLOCK_F) groups.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import capability, launch

# --- kernel: all tensors row-major ----------------------------------------------------------


@triton.jit
def nan_or_max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _encode_kernel(
    x_ptr, W_ptr, b_ptr, pre_ptr, maxima_ptr, N, F, D,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, BAND: tl.constexpr,
    S: tl.constexpr, ABS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """One tile of x W^T + b, and the largest rank of each of its groups."""
    # Programs that run concurrently share a band of tokens, so that they read W's tiles from L2.
    tiles_n, tiles_f = tl.cdiv(N, BLOCK_N), tl.cdiv(F, BLOCK_F)
    band = tl.program_id(0) // (BAND * tiles_f)
    height = tl.minimum(tiles_n - band * BAND, BAND)
    place = tl.program_id(0) % (BAND * tiles_f)
    tile_n, tile_f = band * BAND + place % height, place // height

    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    f = tile_f * BLOCK_F + tl.arange(0, BLOCK_F)
    d = tl.arange(0, BLOCK_D)
    x_ptr += tl.minimum(n, N - 1).to(tl.int64)[:, None] * D + d[None, :]
    W_ptr += tl.minimum(f, F - 1).to(tl.int64)[None, :] * D + d[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_F), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        if EVEN:
            x, W = tl.load(x_ptr), tl.load(W_ptr)
        else:
            x = tl.load(x_ptr, mask=d[None, :] < D - start, other=0.0)
            W = tl.load(W_ptr, mask=d[:, None] < D - start, other=0.0)
        acc = tl.dot(x, W, acc, input_precision="tf32")
        x_ptr += BLOCK_D
        W_ptr += BLOCK_D

    b = tl.load(b_ptr + f, mask=f < F, other=0.0).to(tl.float32)
    pre = (acc + b[None, :]).to(pre_ptr.dtype.element_ty)
    at = n.to(tl.int64)[:, None] * F + f[None, :]
    tl.store(pre_ptr + at, pre, mask=(n < N)[:, None] & (f < F)[None, :])
    rank = pre.to(tl.float32)
    if ABS:
        rank = tl.abs(rank)
    rank = tl.where((f < F)[None, :], rank, 0.0 if ABS else float("-inf"))
    groups = tl.reshape(rank, (BLOCK_N, BLOCK_F // S, S))
    maxima = tl.reduce(groups, 1, nan_or_max).to(maxima_ptr.dtype.element_ty)
    g = tile_f * S + tl.arange(0, S)
    at = n.to(tl.int64)[:, None] * (tiles_f * S) + g[None, :]
    tl.store(maxima_ptr + at, maxima, mask=(n < N)[:, None])


# --- launcher -------------------------------------------------------------------------------


class Tiles(NamedTuple):
    """Tile sizes of the GEMM and launch options of its programs."""

    n: int
    f: int
    d: int
    """For 16-bit entries; half as many of 32 bits."""
    warps: int
    stages: int


SMALL, MEDIUM, LARGE = Tiles(64, 64, 32, 4, 2), Tiles(128, 128, 64, 8, 3), Tiles(128, 256, 64, 8, 3)

BAND = 8
MOST_GROUPS = 8192
MOST_KEPT = 512
"""Limits of the top-k kernel: maxima of a row that fit in registers, and k."""


def tiles_for(x: Tensor) -> Tiles:
    """The largest tiles without register spills, as measured by tests/compile."""
    if x.shape[1] % 16:  # rows are not aligned for wide loads
        return SMALL
    return LARGE if x.element_size() == 2 and capability(x)[0] >= 9 else MEDIUM


def groups_per_tile(F: int, tile: int) -> int:
    """8, to match tensor cores' layout, or fewer if a row would have too many groups."""
    S = 8
    while S > 1 and S * -(-F // tile) > MOST_GROUPS:
        S //= 2
    return S


def launch_encode(x: Tensor, W: Tensor, b: Tensor, by: str) -> tuple[Tensor, Tensor, int]:
    """Contiguous [N, D], [F, D], [F] -> pre-activations [N, F], maxima [N, M], latents per tile."""
    (N, D), F = x.shape, W.shape[0]
    tiles = tiles_for(x)
    block_d = tiles.d * 2 // x.element_size()
    S = groups_per_tile(F, tiles.f)
    pre = x.new_empty(N, F)
    maxima = x.new_empty(N, S * -(-F // tiles.f))
    launch(
        _encode_kernel,
        (-(-N // tiles.n) * -(-F // tiles.f),),
        *(x, W, b, pre, maxima, N, F, D, tiles.n, tiles.f, block_d, BAND),
        *(S, by == "abs", D % block_d == 0),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return pre, maxima, tiles.f


def can_encode(x: Tensor, F: int, k: int) -> bool:
    """Whether the kernel supports this dtype, and has enough groups for an exact top-k."""
    tile = tiles_for(x).f
    groups = groups_per_tile(F, tile) * -(-F // tile)
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    half = x.dtype in (torch.float16, torch.bfloat16)
    return (half or tf32) and k <= min(groups, MOST_KEPT) and groups <= MOST_GROUPS
