"""The k best entries of each token among several processes, exactly, without sending an index.

Every process has its own best entries of each token, largest first and ties by latent, and its
latents are contiguous. So what it keeps is the beginning of its list, and the count of kept entries
follows from the values alone: all those above the k-th largest of all, and of those equal to it as
many as the processes with lower latents leave.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from .collectives import Group, exchange, gather, shares, size_of


def kept_counts(sizes: Float[Tensor, "N K"], k: int, group: Group) -> Int[Tensor, " N"]:
    """How many of its first entries of each token this process keeps.

    `sizes` fall from left to right and may be NaN, which counts as Inf. Each process decides for a
    share of the tokens: it receives N K values and returns N counts.
    """
    sizes = torch.where(sizes.isnan(), torch.inf, sizes)
    theirs = exchange(shares(sizes, size_of(group)), group)  # [process, token, K]
    counts = exchange(_decide(theirs, k), group)  # [decided by, token]
    return counts.view(-1)[: len(sizes)]


def _decide(sizes: Float[Tensor, "L M K"], k: int) -> Int[Tensor, "L M"]:
    """The counts of all processes, for their sizes of the same tokens."""
    L, M, K = sizes.shape
    if k >= L * K:
        return torch.full((L, M), K, dtype=torch.int32, device=sizes.device)
    every = sizes.transpose(0, 1).flatten(1)
    least = every.topk(k, dim=1, sorted=True).values[:, -1:]
    above = (sizes > least).sum(2, dtype=torch.int32)
    equal = (sizes == least).sum(2, dtype=torch.int32)
    before = equal.cumsum(0, dtype=torch.int32) - equal
    room = (k - above.sum(0, dtype=torch.int32) - before).clamp_min(0)
    return above + room.minimum(equal)


def longest(counts: Int[Tensor, " N"]) -> int:
    """The largest count, at least 1: as many columns hold all that is kept. Waits for a GPU."""
    return max(int(counts.max()) if len(counts) else 0, 1)


def widest(x: Shaped[Tensor, "N K"], group: Group) -> int:
    """The largest K in the group. Waits for a GPU."""
    return int(gather(torch.tensor(x.shape[1], device=x.device), group).max())


DIGIT = 11
"""Bits of a number that are told apart at a time."""


def batch_threshold(
    sizes: Float[Tensor, " M"], k: int, count: Callable[[Tensor], Tensor]
) -> tuple[Float[Tensor, ""], int]:
    """The k-th largest of all processes' positive sizes, and how many equal to it are among the k
    largest; 0 and k where there are fewer than k. `count` adds up integers over all processes.

    The bits of positive numbers are in the order of the numbers. So the digits of the k-th largest
    are found from the highest to the lowest, each from a histogram of that digit among the sizes
    that have all higher digits in common with it: a few thousand integers per process and digit.
    """
    wide = sizes.to(torch.promote_types(sizes.dtype, torch.float32))
    bits, kind = 8 * wide.itemsize, torch.int32 if wide.itemsize == 4 else torch.int64
    keys, found = wide.view(kind), 0
    for low in reversed(range(0, bits, DIGIT)):
        digits = (keys >> low) % (1 << DIGIT)
        totals = count(torch.bincount(digits, minlength=1 << DIGIT))
        beyond = totals.flip(0).cumsum(0)  # from the largest digit down
        place = int((beyond < k).sum())
        if place == len(beyond):
            return wide.new_zeros(()), k
        k -= int(beyond[place - 1]) if place else 0
        digit = len(beyond) - 1 - place
        found, keys = found | digit << low, keys[digits == digit]
    return torch.tensor(found, dtype=kind, device=wide.device).view(wide.dtype), k
