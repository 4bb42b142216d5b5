"""How _topk_kernel.py groups the entries of a row, and how many warps that takes.

A group has V entries STEP apart, V more JUMP after those, and so on through a tile of S groups.
Found by the kernel, all M groups share one tile, and V neighbors are one vector load; the encoder's
tiles have their own layout. Shapes: F latents, M groups.
"""

import math
from typing import NamedTuple

from ._launch import power_of_2


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
    """Groups that share the whole row: group g has V neighbors from g V on, every M V entries.

    Few groups need few warps; more of them hold two of the k, and all pieces of those are read
    again: c = k^2 / 2 M groups, c F / M entries. sqrt(F k) / 8 groups keep that below 1/20 of the
    row, sectors of memory counted whole, and 4 k groups leave room for candidates.
    """
    most = power_of_2(F)
    V = 16 // itemsize
    wanted = max(256, min(4096, power_of_2(math.isqrt(F * k) // 8)))
    M = min(most, max(4 * power_of_2(k), min(wanted, most // V)))
    V = min(V, most // M)
    return Layout(M, M, V, 1, M * V, -(-F // (M * V)) * M * V, M)


def encoder_tiles(groups: int, tile: int, F: int) -> Layout:
    """Groups of the encoder's tiles: group s of a tile has every S-th entry from s on."""
    S = groups // -(-F // tile)
    V = min(8, tile // S)
    return Layout(power_of_2(groups), S, V, S, S * V, tile, groups)


def warps_for(M: int) -> int:
    """As few as keep a thread's 8 or 16 groups in registers.

    What follows the read of a row costs each warp the same instructions, and rows of 64 KB leave
    time for 14,000 in all; a single warp waits at no barrier.
    """
    return min(8, max(1, M // 256 if M <= 1024 else M // 512))
