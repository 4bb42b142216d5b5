"""The kernel of topk.py: the k largest entries of each row in one read of it.

The maxima of M groups stay in registers, found here or by the encoder's product. Bisecting for a
key that at least k of them reach takes the place of sorting them; the entries that reach it, k and
a few, are gathered from the winning groups and ranked by (key, -index), which has no ties. Where
ties make more of them than there is room for, bisecting over the row itself finds exactly k. Keys
are integers in the order of the entries as they are in memory, so no two passes can disagree.

A Layout says where the groups have their entries: V of them STEP apart, V more JUMP after those,
and so on through a tile of S groups. Found here, all M groups share one tile, and V neighbours are
one vector load; the encoder's tiles have their own layout.
Shapes: N tokens, F latents, K kept, M groups.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch, power_of_2
from .topk import DTYPES, By

# --- kernel: all tensors row-major ----------------------------------------------------------

_LOWEST = tl.constexpr(-0x7FFFFFFFFFFFFFFF)
"""Below every packed (key, index)."""


@triton.jit
def _load_ranks(row_ptr, column, F, ABS: tl.constexpr):
    """Entries as float32 to be ranked.

    Those beyond the row rank no higher than any in it and behind its equals, and k are kept of F:
    none of them can win, so nobody has to mask them again.
    """
    if ABS:
        return tl.abs(tl.load(row_ptr + column, mask=column < F, other=0.0).to(tl.float32))
    return tl.load(row_ptr + column, mask=column < F, other=float("-inf")).to(tl.float32)


@triton.jit
def _key(x, SHIFT: tl.constexpr):
    """int32 in the order of float32 x, -0.0 equal to 0.0, NaN above all.

    SHIFT drops the low bits that x's dtype in memory does not have.
    """
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(x == x, ordered, 0x7FC00000) >> SHIFT


@triton.jit
def _pack(key, column):
    """int64 in the order of key, then of falling column."""
    return (key.to(tl.int64) << 32) + (0x7FFFFFFF - column)


@triton.jit
def _group_maxima(
    row_ptr, F, M: tl.constexpr, V: tl.constexpr, ABS: tl.constexpr, SHIFT: tl.constexpr
):
    """Largest key of each group -> [M]"""
    tile = tl.arange(0, M)[:, None] * V + tl.arange(0, V)[None, :]
    best = _load_ranks(row_ptr, tile, F, ABS)
    for start in range(M * V, F, M * V):
        x = _load_ranks(row_ptr, start + tile, F, ABS)
        best = tl.maximum(best, x, propagate_nan=tl.PropagateNan.ALL)
    return tl.max(_key(best, SHIFT), axis=1)


@triton.jit
def _load_maxima(maxima_ptr, groups, M: tl.constexpr, SHIFT: tl.constexpr):
    """The same, already found: as many as there are groups, then the lowest -> [M]"""
    g = tl.arange(0, M)
    best = tl.load(maxima_ptr + g, mask=g < groups, other=float("-inf")).to(tl.float32)
    return tl.where(g < groups, _key(best, SHIFT), -0x80000000)


@triton.jit
def _reached_by(keys, k):
    """A key that at least k of keys reach: exactly k, unless ties forbid it."""
    low, high = tl.min(keys).to(tl.int64), tl.max(keys).to(tl.int64) + 1
    count = tl.sum((keys >= low).to(tl.int32))
    while (high - low > 1) & (count != k):
        middle = (low + high) >> 1
        above = tl.sum((keys >= middle.to(tl.int32)).to(tl.int32))
        low, high = tl.where(above >= k, middle, low), tl.where(above >= k, high, middle)
        count = tl.where(above >= k, above, count)
    return low.to(tl.int32)


@triton.jit
def _pack_candidates(
    row_ptr, group_ptr, packed_ptr, maxima, low, F, tile,
    M: tl.constexpr, S: tl.constexpr, V: tl.constexpr, STEP: tl.constexpr, JUMP: tl.constexpr,
    CAPACITY: tl.constexpr, ABS: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Pack the entries that reach low, in any order; count them, though room is limited."""
    won = maxima >= low
    tl.store(group_ptr + tl.cumsum(won.to(tl.int32)) - 1, tl.arange(0, M), mask=won)
    tl.debug_barrier()
    member = tl.arange(0, CAPACITY * V)
    inside = member // V < tl.sum(won.to(tl.int32))
    g = tl.load(group_ptr + member // V, mask=inside, other=0)
    first = g // S * tile + g % S * (V if STEP == 1 else 1) + member % V * STEP
    count = 0
    for start in range(0, tile, JUMP):
        column = start + first
        key = _key(_load_ranks(row_ptr, column, F, ABS), SHIFT)
        reach = inside & (key >= low)
        place = count + tl.cumsum(reach.to(tl.int32)) - 1
        tl.store(packed_ptr + place, _pack(key, column), mask=reach & (place < CAPACITY))
        count += tl.sum(reach.to(tl.int32))
    return count


@triton.jit
def _count(row_ptr, F, least, BLOCK: tl.constexpr, ABS: tl.constexpr, SHIFT: tl.constexpr):
    """How many entries of the row have a key of at least `least`."""
    count = 0
    for start in range(0, F, BLOCK):
        column = start + tl.arange(0, BLOCK)
        key = _key(_load_ranks(row_ptr, column, F, ABS), SHIFT)
        count += tl.sum((key >= least).to(tl.int32))
    return count


@triton.jit
def _pack_exactly(
    row_ptr, packed_ptr, low, high, F, k,
    BLOCK: tl.constexpr, ABS: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Pack the k largest entries of a row, k or more of which reach low and none high."""
    low, high = low.to(tl.int64), high.to(tl.int64)
    sure = 0  # entries that reach high: fewer than k
    while high - low > 1:
        middle = (low + high) >> 1
        above = _count(row_ptr, F, middle.to(tl.int32), BLOCK, ABS, SHIFT)
        low, high = tl.where(above >= k, middle, low), tl.where(above >= k, high, middle)
        sure = tl.where(above >= k, sure, above)
    low = low.to(tl.int32)
    packed, tied = 0, 0
    for start in range(0, F, BLOCK):
        column = start + tl.arange(0, BLOCK)
        key = _key(_load_ranks(row_ptr, column, F, ABS), SHIFT)
        equal = key == low
        early = tied + tl.cumsum(equal.to(tl.int32)) <= k - sure
        chosen = (key > low) | (equal & early)
        place = packed + tl.cumsum(chosen.to(tl.int32)) - 1
        tl.store(packed_ptr + place, _pack(key, column), mask=chosen)
        packed += tl.sum(chosen.to(tl.int32))
        tied += tl.sum(equal.to(tl.int32))


@triton.jit
def _topk_kernel(
    pre_ptr, maxima_ptr, group_ptr, packed_ptr, values_ptr, indices_ptr,
    stride, F, k, tile, groups,
    M: tl.constexpr, S: tl.constexpr, V: tl.constexpr, STEP: tl.constexpr, JUMP: tl.constexpr,
    CAPACITY: tl.constexpr, BLOCK: tl.constexpr, ABS: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    row_ptr = pre_ptr + n * stride
    packed_ptr += n * CAPACITY
    if maxima_ptr is None:
        maxima = _group_maxima(row_ptr, F, M, V, ABS, SHIFT)
    else:
        maxima = _load_maxima(maxima_ptr + n * groups, groups, M, SHIFT)
    low, high = _reached_by(maxima, k), tl.max(maxima) + 1
    count = tl.sum((maxima >= low).to(tl.int32))  # so many candidates at least
    if count <= CAPACITY:
        count = _pack_candidates(
            row_ptr, group_ptr + n * CAPACITY, packed_ptr, maxima, low, F, tile,
            M, S, V, STEP, JUMP, CAPACITY, ABS, SHIFT,
        )  # fmt: skip
    if count > CAPACITY:
        tl.debug_barrier()
        _pack_exactly(row_ptr, packed_ptr, low, high, F, k, BLOCK, ABS, SHIFT)
        count = tl.minimum(count, k)
    tl.debug_barrier()
    slot = tl.arange(0, CAPACITY)
    mine = tl.load(packed_ptr + slot, mask=slot < count, other=_LOWEST)
    if CAPACITY <= 512:
        rank = tl.zeros((CAPACITY,), dtype=tl.int32)
        for start in range(0, count, 16):
            other = start + tl.arange(0, 16)
            theirs = tl.load(packed_ptr + other, mask=other < count, other=_LOWEST)
            rank += tl.sum((theirs[None, :] > mine[:, None]).to(tl.int32), axis=1)
    else:
        mine, rank = tl.sort(mine, descending=True), slot
    index = 0x7FFFFFFF - (mine & 0x7FFFFFFF).to(tl.int32)
    tl.store(indices_ptr + n * k + rank, index, mask=rank < k)
    if values_ptr is not None:
        value = tl.load(row_ptr + index, mask=rank < k)
        if not ABS:
            value = tl.maximum(value.to(tl.float32), 0.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(values_ptr + n * k + rank, value, mask=rank < k)


# --- launcher -------------------------------------------------------------------------------


class Layout(NamedTuple):
    """How the entries of a row are grouped."""

    M: int
    """Groups, rounded up to a power of 2."""
    S: int
    """Groups per tile."""
    V: int
    STEP: int
    JUMP: int
    tile: int
    """Entries per tile."""
    groups: int


def one_tile(F: int, k: int, itemsize: int) -> Layout:
    """Groups that share the whole row: group g has V neighbours from g V on, every M V entries."""
    most = power_of_2(F)
    M = min(most, max(4 * power_of_2(k), min(2048, power_of_2(math.isqrt(F * k)))))
    V = min(16 // itemsize, 16384 // M, most // M)
    return Layout(M, M, V, 1, M * V, -(-F // (M * V)) * M * V, M)


def encoder_tiles(groups: int, tile: int, F: int) -> Layout:
    """Groups of the encoder's tiles: group s of a tile has every S-th entry from s on."""
    S = groups // -(-F // tile)
    V = min(8, tile // S)
    return Layout(power_of_2(groups), S, V, S, S * V, tile, groups)


def launch_topk(
    pre: Tensor,
    k: int,
    by: By,
    values: Tensor | None,
    indices: Tensor,
    maxima: Tensor | None = None,
    tile: int = 0,
) -> None:
    """Write the k largest of each row, largest first, to contiguous [N, K]; no values if None.

    Rows of pre [N, F] may be apart, their entries are not. by="value" writes 0 for negative ones.
    Given the maxima [N, groups] of the encoder's tiles, it reads only the best groups of each row.
    """
    N, F = pre.shape
    if maxima is None:
        layout = one_tile(F, k, pre.element_size())
    else:
        layout = encoder_tiles(maxima.shape[1], tile, F)
    capacity = max(16, 2 * power_of_2(k))  # random rows need 1.6 k at most
    found = torch.empty(N, capacity, dtype=torch.int32, device=pre.device)
    packed = torch.empty(N, capacity, dtype=torch.int64, device=pre.device)
    *constants, tile, groups = layout
    launch(
        _topk_kernel,
        (N,),
        *(pre, maxima, found, packed, values, indices, pre.stride(0), F, k, tile, groups),
        *(*constants, capacity, min(2048, layout.M), by == "abs", DTYPES[pre.dtype]),
        num_warps=min(8, max(1, layout.M * layout.V // 512)),
    )
