"""Messages between processes outside the training step, such as from the loader thread."""

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

from fastsae.shards import Channel

from .collectives import gather, new_group, padded

PATIENCE = timedelta(days=7)
"""Longer than anything that one process may do while the others wait. One that ends is noticed at
once."""


class GroupChannel(Channel):
    """A group of its own, so that its calls do not meet those of other threads."""

    def __init__(self, ranks: Sequence[int]):
        """Made by the processes of these ranks at once."""
        self.rank, self.size = ranks.index(dist.get_rank()), len(ranks)
        self.group = new_group(ranks, backend="gloo", timeout=PATIENCE)

    def largest(self, own: int) -> int:
        return int(gather(torch.tensor(own), self.group).max())

    def rows_of_all(
        self, own: Shaped[Tensor, "n ..."], counts: Sequence[int]
    ) -> list[Shaped[Tensor, "m ..."]]:
        every = gather(padded(own, max(counts)), self.group)
        return [rows[:count] for rows, count in zip(every, counts, strict=True)]
