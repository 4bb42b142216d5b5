"""The kernel of topk.py: the k largest entries of each row in one read of it.

1. Each of M groups keeps in registers its largest key, which piece of V entries that is in, and
   the largest key of its other pieces; or the encoder has found the maxima.
2. Counts of the maxima that reach P pivots narrow down a key that k and a few more reach.
3. Those groups hold the k largest entries. One piece of each is read again, or all if another has
   such a key as well. What reaches the key is listed, k and a few.
4. Listed entries are ranked by (key, -index), which has no ties.
Where more are listed than there is room for, as by ties, counts of the whole row find the k-th
largest key exactly. Keys are integers in the order of the entries as they are in memory, so no two
passes can disagree.

Where the groups have their entries is a Layout of _topk_layout.py.
Shapes: N tokens, F latents, K kept, M groups, P pivots or pieces, V entries of a piece.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._encode_kernel import nan_or_max
from ._launch import launch, power_of_2
from ._topk_layout import encoder_tiles, one_tile, warps_for
from .topk import DTYPES, By

# --- kernel: all tensors row-major ----------------------------------------------------------

_LOWEST = tl.constexpr(-0x7FFFFFFFFFFFFFFF)
"""Below every packed (key, index)."""

_NONE = tl.constexpr(-0x80000000)
"""Below every key."""

_PIVOTS = tl.constexpr(8)
"""A power of two. More take fewer rounds, but each round costs M comparisons per pivot."""


@triton.jit
def _load_ranks(row_ptr, column, F, ABS: tl.constexpr):
    """Entries as float32 to be ranked.

    Those beyond the row rank no higher than any in it, and behind its equals: as k are kept of F,
    none of them wins, and nobody has to mask them again.
    """
    x = tl.load(row_ptr + column, mask=column < F, other=0.0 if ABS else float("-inf"))
    return tl.abs(x.to(tl.float32)) if ABS else x.to(tl.float32)


@triton.jit
def sort_key(x, SHIFT: tl.constexpr):
    """int32 in the order of float32 x, -0.0 equal to 0.0, NaN above all.

    SHIFT drops the low bits that x's dtype in memory does not have.
    """
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # -0.0 + 0.0 is 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(x == x, ordered, 0x7FC00000) >> SHIFT


@triton.jit
def _pack(key, column):
    """int64 in the order of key, then of falling column."""
    return (key.to(tl.int64) << 32) + (0x7FFFFFFF - column)


@triton.jit
def _group_maxima(
    row_ptr, F,
    M: tl.constexpr, V: tl.constexpr, EVEN: tl.constexpr, ABS: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Largest key of each group, its piece, and the largest of its other pieces -> [M] each

    The piece is the first of equals. EVEN rows fill the last tile.
    """
    g = tl.arange(0, M)
    column = g[:, None] * V + tl.arange(0, V)[None, :]
    best = tl.full((M,), _NONE, dtype=tl.int32)
    other, begin = best, tl.zeros((M,), dtype=tl.int32)
    for start in range(0, F, M * V):
        if EVEN:
            x = tl.load(row_ptr + start + column).to(tl.float32)
            x = tl.abs(x) if ABS else x
        else:
            x = _load_ranks(row_ptr, start + column, F, ABS)
        key = sort_key(tl.reduce(x, 1, nan_or_max), SHIFT)
        begin = tl.where(key > best, start, begin)
        other = tl.maximum(other, tl.minimum(best, key))
        best = tl.maximum(best, key)
    return best, begin // V + g, other


@triton.jit
def _pivots_between(low, high, P: tl.constexpr):
    """Keys in (low, high), evenly spaced; the first is next to low, which many may equal. -> [P]"""
    return (low + 1 + ((high - low - 1) * tl.arange(0, P) // P)).to(tl.int32)


@triton.jit
def _count_reaching(keys, pivots):
    """[M], [P] -> [P]"""
    return tl.sum((keys[None, :] >= pivots[:, None]).to(tl.int32), axis=1)


@triton.jit
def _reached_by(keys, k, enough):
    """A key that k to `enough` of keys reach, or more where ties forbid it; and how many do."""
    low, high = tl.min(keys).to(tl.int64), tl.max(keys).to(tl.int64) + 1
    count = keys.shape[0]
    while (high - low > 1) & (count > enough):
        pivots = _pivots_between(low, high, _PIVOTS)
        counts = _count_reaching(keys, pivots)
        low = tl.max(tl.where(counts >= k, pivots, low))
        high = tl.min(tl.where(counts >= k, high, pivots))
        count = tl.min(tl.where(counts >= k, counts, count))
    return low.to(tl.int32), count


@triton.jit
def _pack_pieces(
    row_ptr, packed_ptr, count, first, inside, low, F,
    V: tl.constexpr, STEP: tl.constexpr, CAPACITY: tl.constexpr, ABS: tl.constexpr,
    SHIFT: tl.constexpr,
):  # fmt: skip
    """Pack the entries that reach low of the pieces that begin at first [P]; count them all."""
    column = first[:, None] + tl.arange(0, V)[None, :] * STEP
    key = sort_key(_load_ranks(row_ptr, column, F, ABS), SHIFT)
    reach = (inside[:, None] & (key >= low)).to(tl.int32)
    before = tl.cumsum(tl.reshape(reach, (reach.numel,)))
    place = count + tl.reshape(before, reach.shape) - 1
    tl.store(packed_ptr + place, _pack(key, column), mask=(reach != 0) & (place < CAPACITY))
    return count + tl.sum(reach)


@triton.jit
def _pack_candidates(
    row_ptr, found_ptr, packed_ptr, best, piece, other, low, won, F, tile,
    M: tl.constexpr, S: tl.constexpr, V: tl.constexpr, STEP: tl.constexpr, JUMP: tl.constexpr,
    CAPACITY: tl.constexpr, PIECES: tl.constexpr, ABS: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Pack the entries that reach low, in any order; count them, though room is limited.

    won groups have such entries. Those with one such piece are listed by it, from the front of
    found; the others by their own number, from the back.
    """
    one, several = (best >= low) & (other < low), other >= low
    # Any order will do: each thread's groups come one after another, in as few steps as it has.
    both = tl.reshape(one.to(tl.int32) + (several.to(tl.int32) << 16), (M // PIECES, PIECES))
    of_thread = tl.sum(both, axis=0)
    before = (tl.cumsum(of_thread) - of_thread)[None, :] + tl.cumsum(both, axis=0)
    before = tl.reshape(before, (M,))
    at = tl.where(one, before & 0xFFFF, CAPACITY + 1 - (before >> 16)) - 1
    tl.store(found_ptr + at, tl.where(one, piece, tl.arange(0, M)), mask=one | several)
    crowded = tl.sum(several.to(tl.int32))
    tl.debug_barrier()
    count, p = 0, tl.arange(0, PIECES)
    for start in range(0, won - crowded, PIECES):
        inside = start + p < won - crowded
        first = tl.load(found_ptr + start + p, mask=inside, other=0) * V
        count = _pack_pieces(
            row_ptr, packed_ptr, count, first, inside, low, F, V, 1, CAPACITY, ABS, SHIFT
        )
    each = tile // JUMP
    for start in range(0, crowded * each, PIECES):
        inside = start + p < crowded * each
        g = tl.load(found_ptr + CAPACITY - 1 - (start + p) // each, mask=inside, other=0)
        first = g // S * tile + g % S * (V if STEP == 1 else 1) + (start + p) % each * JUMP
        count = _pack_pieces(
            row_ptr, packed_ptr, count, first, inside, low, F, V, STEP, CAPACITY, ABS, SHIFT
        )
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
        pivots = _pivots_between(low, high, _PIVOTS)
        counts = tl.zeros((_PIVOTS,), dtype=tl.int32)
        for start in range(0, F, BLOCK):
            column = start + tl.arange(0, BLOCK)
            counts += _count_reaching(sort_key(_load_ranks(row_ptr, column, F, ABS), SHIFT), pivots)
        low = tl.max(tl.where(counts >= k, pivots, low))
        high = tl.min(tl.where(counts >= k, high, pivots))
        sure = tl.max(tl.where(counts >= k, sure, counts))
    low = low.to(tl.int32)
    above, equal, start = 0, 0, 0  # listed from the front, and after all that are above
    while (start < F) & (above + tl.minimum(equal, k - sure) < k):
        column = start + tl.arange(0, BLOCK)
        key = sort_key(_load_ranks(row_ptr, column, F, ABS), SHIFT)
        both = (key > low).to(tl.int32) + ((key == low).to(tl.int32) << 16)
        before = tl.cumsum(both)
        place = tl.where(key > low, above + (before & 0xFFFF), sure + equal + (before >> 16)) - 1
        tl.store(packed_ptr + place, _pack(key, column), mask=(key >= low) & (place < k))
        found = tl.sum(both)
        above, equal, start = above + (found & 0xFFFF), equal + (found >> 16), start + BLOCK


@triton.jit
def _ranks(packed_ptr, mine, count, CAPACITY: tl.constexpr):
    """How many of the listed entries are above each of mine -> [CAPACITY]"""
    above = tl.zeros((16, CAPACITY), dtype=tl.int32)
    for start in range(0, count, 16):
        other = start + tl.arange(0, 16)
        theirs = tl.load(packed_ptr + other, mask=other < count, other=_LOWEST)
        above += (theirs[:, None] > mine[None, :]).to(tl.int32)
    return tl.sum(above, axis=0)


@triton.jit
def _topk_kernel(
    pre_ptr, maxima_ptr, found_ptr, packed_ptr, values_ptr, indices_ptr,
    stride, F, k, tile, groups,
    M: tl.constexpr, S: tl.constexpr, V: tl.constexpr, STEP: tl.constexpr, JUMP: tl.constexpr,
    EVEN: tl.constexpr, CAPACITY: tl.constexpr, PIECES: tl.constexpr, BLOCK: tl.constexpr,
    ABS: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    row_ptr = pre_ptr + n * stride
    packed_ptr += n * CAPACITY
    if maxima_ptr is None:
        best, piece, other = _group_maxima(row_ptr, F, M, V, EVEN, ABS, SHIFT)  # pyright: ignore
    else:
        g = tl.arange(0, M)
        best = tl.load(maxima_ptr + n * groups + g, mask=g < groups, other=0.0).to(tl.float32)
        best = tl.where(g < groups, sort_key(best, SHIFT), _NONE)
        piece, other = best, best  # nobody knows the piece: all count as others
    # A few more than k cost less than another round.
    low, won = _reached_by(best, k, k + k // 4)
    count = won  # so many candidates at least
    if won <= CAPACITY:
        count = _pack_candidates(
            row_ptr, found_ptr + n * CAPACITY, packed_ptr, best, piece, other, low, won, F, tile,
            M, S, V, STEP, JUMP, CAPACITY, PIECES, ABS, SHIFT,
        )  # fmt: skip
    if count > CAPACITY:
        tl.debug_barrier()
        _pack_exactly(row_ptr, packed_ptr, low, tl.max(best) + 1, F, k, BLOCK, ABS, SHIFT)
        count = k
    tl.debug_barrier()
    slot = tl.arange(0, CAPACITY)
    mine = tl.load(packed_ptr + slot, mask=slot < count, other=_LOWEST)
    if CAPACITY <= 512:
        rank = _ranks(packed_ptr, mine, count, CAPACITY)
    else:
        mine, rank = tl.sort(mine, descending=True), slot
    index = 0x7FFFFFFF - (mine & 0x7FFFFFFF).to(tl.int32)
    tl.store(indices_ptr + n * k + rank, index, mask=rank < k)
    if values_ptr is not None:
        value = tl.load(row_ptr + index, mask=rank < k)
        if not ABS:
            value = nan_or_max(value.to(tl.float32), 0.0)
        tl.store(values_ptr + n * k + rank, value, mask=rank < k)


# --- launcher -------------------------------------------------------------------------------


def launch_topk(
    pre: Tensor, k: int, by: By, values: Tensor | None, indices: Tensor,
    maxima: Tensor | None = None, tile: int = 0,
) -> None:  # fmt: skip
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
    threads, even = 32 * warps_for(layout.M), maxima is None and layout.tile == F
    launch(
        _topk_kernel,
        (N,),
        *(pre, maxima, found, packed, values, indices, pre.stride(0), F, k, tile, groups),
        *constants,
        EVEN=even,
        CAPACITY=capacity,
        PIECES=min(threads, layout.M),
        BLOCK=8 * threads,
        ABS=by == "abs",
        SHIFT=DTYPES[pre.dtype],
        num_warps=threads // 32,
        maxnreg=80 if even and threads == 32 else None,  # 25 programs in place of 21, and no spill
    )
