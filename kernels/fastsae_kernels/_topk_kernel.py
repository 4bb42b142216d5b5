"""The kernel of topk.py: finds the k largest entries of each row while reading it once.

1. For each of M groups, registers hold the largest key, the piece of V entries that contains it,
   and the largest key of the other pieces; or the encoder has computed the maxima.
2. A search, which counts the maxima >= each of P pivots, finds a key that k or slightly more maxima
   reach.
3. These groups contain the k largest entries. One piece of each is read again, or all of them if
   another piece reaches the key, too. Entries that reach the key are listed: k or slightly more.
4. The listed entries are ranked by (key, -index), which has no ties.
If the list overflows, for example because of ties, counts over the whole row find the k-th largest
key exactly. Keys are integers in the order of the entries in memory, so the passes always agree.

_topk_layout.py defines which entries a group has.
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
"""A power of two. More pivots need fewer rounds, but each costs M comparisons per round."""


@triton.jit
def _load_ranks(row_ptr, column, F, ABS: tl.constexpr):
    """Load entries as float32 to be ranked.

    Padding beyond the row ranks no higher than any entry, and loses ties by its index. Since
    k <= F, it is never selected, and needs no further masks.
    """
    x = tl.load(row_ptr + column, mask=column < F, other=0.0 if ABS else float("-inf"))
    return tl.abs(x.to(tl.float32)) if ABS else x.to(tl.float32)


@triton.jit
def sort_key(x, SHIFT: tl.constexpr):
    """int32 keys in the order of float32 x; -0.0 equals 0.0, and NaN is above all.

    SHIFT drops the low bits that x's dtype in memory lacks.
    """
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # -0.0 + 0.0 is 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(x == x, ordered, 0x7FC00000) >> SHIFT


@triton.jit
def _pack(key, column):
    """int64 in ascending order of key, then in descending order of column."""
    return (key.to(tl.int64) << 32) + (0x7FFFFFFF - column)


@triton.jit
def _group_maxima(
    row_ptr, F,
    M: tl.constexpr, V: tl.constexpr, EVEN: tl.constexpr, ABS: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Each group's largest key, its piece, and the largest key of other pieces -> [M] each

    Ties go to the first piece. EVEN rows fill the last tile, and need no mask.
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
    """Evenly spaced keys in (low, high); the first is low + 1, since many may equal low. -> [P]"""
    return (low + 1 + ((high - low - 1) * tl.arange(0, P) // P)).to(tl.int32)


@triton.jit
def _count_reaching(keys, pivots):
    """How many keys are >= each pivot: [M], [P] -> [P]"""
    return tl.sum((keys[None, :] >= pivots[:, None]).to(tl.int32), axis=1)


@triton.jit
def _reached_by(keys, k, enough):
    """A key that k to `enough` of the keys reach (more if there are ties), and how many do."""
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
    """Pack the entries >= low of the pieces that begin at first [P]; returns the new count."""
    column = first[:, None] + tl.arange(0, V)[None, :] * STEP
    key = sort_key(_load_ranks(row_ptr, column, F, ABS), SHIFT)
    reach = (inside[:, None] & (key >= low)).to(tl.int32)
    before = tl.cumsum(tl.reshape(reach, (reach.numel,)))
    place = count + tl.reshape(before, reach.shape) - 1
    tl.store(packed_ptr + place, _pack(key, column), mask=(reach != 0) & (place < CAPACITY))
    return count + tl.sum(reach)


@triton.jit
def _pack_candidates(
    row_ptr, found_ptr, packed_ptr, best, piece, other, low, n_best, F, tile,
    M: tl.constexpr, S: tl.constexpr, V: tl.constexpr, STEP: tl.constexpr, JUMP: tl.constexpr,
    CAPACITY: tl.constexpr, PIECES: tl.constexpr, ABS: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Pack the entries >= low, in any order; returns their count, which may exceed CAPACITY.

    `n_best` groups have such entries. `found` lists the piece of those with only one such piece
    from the front, and the group number of the others from the back.
    """
    one, several = (best >= low) & (other < low), other >= low
    # Any order is fine. In this one each thread's groups are consecutive, for the shortest scan.
    both = tl.reshape(one.to(tl.int32) + (several.to(tl.int32) << 16), (M // PIECES, PIECES))
    of_thread = tl.sum(both, axis=0)
    before = (tl.cumsum(of_thread) - of_thread)[None, :] + tl.cumsum(both, axis=0)
    before = tl.reshape(before, (M,))
    at = tl.where(one, before & 0xFFFF, CAPACITY + 1 - (before >> 16)) - 1
    tl.store(found_ptr + at, tl.where(one, piece, tl.arange(0, M)), mask=one | several)
    n_several = tl.sum(several.to(tl.int32))
    tl.debug_barrier()
    count, p = 0, tl.arange(0, PIECES)
    for start in range(0, n_best - n_several, PIECES):
        inside = start + p < n_best - n_several
        first = tl.load(found_ptr + start + p, mask=inside, other=0) * V
        count = _pack_pieces(
            row_ptr, packed_ptr, count, first, inside, low, F, V, 1, CAPACITY, ABS, SHIFT
        )
    each = tile // JUMP
    for start in range(0, n_several * each, PIECES):
        inside = start + p < n_several * each
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
    """Pack the k largest entries of a row, of which at least k are >= low and none is >= high."""
    low, high = low.to(tl.int64), high.to(tl.int64)
    sure = 0  # entries >= high: fewer than k, so all of them are among the k largest
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
    # Entries > low are listed from the front, those == low after all of them.
    above, equal, start = 0, 0, 0
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
    """Top-k of one row; steps 1 to 4 of the module."""
    n = tl.program_id(0).to(tl.int64)
    row_ptr = pre_ptr + n * stride
    packed_ptr += n * CAPACITY
    if maxima_ptr is None:
        best, piece, other = _group_maxima(row_ptr, F, M, V, EVEN, ABS, SHIFT)  # pyright: ignore
    else:
        g = tl.arange(0, M)
        best = tl.load(maxima_ptr + n * groups + g, mask=g < groups, other=0.0).to(tl.float32)
        best = tl.where(g < groups, sort_key(best, SHIFT), _NONE)
        piece, other = best, best  # the piece is unknown: read all pieces of these groups
    # Slightly more than k candidates cost less than another round.
    low, n_best = _reached_by(best, k, k + k // 4)
    count = n_best  # at least that many candidates
    if n_best <= CAPACITY:
        count = _pack_candidates(
            row_ptr, found_ptr + n * CAPACITY, packed_ptr, best, piece, other, low, n_best, F, tile,
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

    pre [N, F] needs contiguous entries within rows. by="value" writes 0 for negative values. With
    the maxima [N, groups] of the encoder's tiles, it reads only the best groups of each row.
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
        maxnreg=80 if even and threads == 32 else None,  # 25 resident programs, not 21
    )
