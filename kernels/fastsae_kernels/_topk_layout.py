"""How _topk_kernel.py divides the entries of a row into groups, and how many warps it needs.

A group's first piece is V entries, STEP apart; the next piece is JUMP entries later, and so on
through a tile of S groups. If the kernel computes the maxima, all M groups share one tile, and a
piece is one vector load; the encoder's tiles have their own layout. Shapes: F latents, M groups.
"""

import math
from typing import NamedTuple

from ._launch import power_of_2


class Layout(NamedTuple):
    """Which entries of a row each group has."""

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
    """Groups over the whole row: group g has V neighbors from g V on, repeated every M V entries.

    Fewer groups need fewer warps. But then more groups contain two of the k largest entries, and
    all their pieces are read again: c = k^2 / 2 M groups, c F / M entries. With sqrt(F k) / 8
    groups, this is below 1/20 of the row, even in whole sectors of memory; 4 k groups leave room
    for candidates.
    """
    most = power_of_2(F)
    V = 16 // itemsize
    wanted = max(256, min(4096, power_of_2(math.isqrt(F * k) // 8)))
    M = min(most, max(4 * power_of_2(k), min(wanted, most // V)))
    V = min(V, most // M)
    return Layout(M, M, V, 1, M * V, -(-F // (M * V)) * M * V, M)


def encoder_tiles(groups: int, tile: int, F: int) -> Layout:
    """Groups of the encoder's tiles: group s of a tile has every S-th entry, starting with s."""
    S = groups // -(-F // tile)
    V = min(8, tile // S)
    return Layout(power_of_2(groups), S, V, S, S * V, tile, groups)


def warps_for(M: int) -> int:
    """The fewest warps that hold all groups in registers, 8 or 16 per thread.

    After the row is read, every warp runs the same number of instructions, and a row of 64 KB
    leaves time for 14,000 in total; a single warp also needs no barriers.
    """
    return min(8, max(1, M // 256 if M <= 1024 else M // 512))
