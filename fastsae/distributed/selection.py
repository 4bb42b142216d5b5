"""The k best entries of each token among several processes, exactly, without sending an index.

Every process has its own best entries of each token, largest first and ties by latent, and its
latents are contiguous. So what it keeps is the beginning of its list, and the count of kept entries
follows from the values alone: all those above the k-th largest of all, and of those equal to it as
many as the processes with lower latents leave.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

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


def as_wide_as_all(x: Tensor, group: Group) -> Tensor:
    """x [N, K] with columns of zeros, to the largest K in the group."""
    if group is None:
        return x
    width = int(gather(torch.tensor(x.shape[1], device=x.device), group).max())
    return pad(x, (0, width - x.shape[1]))
