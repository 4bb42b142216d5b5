"""A mesh of processes: how they are arranged, and what they do for each other in a step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn.functional import pad

from fastsae.codes import Codes
from fastsae.shards import ONE_PROCESS, Shards
from fastsae_kernels import By, decode, gather_dot, squared_error

from .channel import GroupChannel
from .collectives import (
    Group,
    Spread,
    Total,
    before_collectives,
    begin,
    gather,
    new_group,
    size_of,
    sum_shares,
    total,
)
from .selection import batch_threshold, kept_counts, longest, widest

Anything = TypeVar("Anything")

CALLS = 2
"""What a process says in place of 0 or 1 before it calls what all must call at once."""


@dataclass(frozen=True)
class Axes:
    """The size of a mesh: processes hold different tokens along `data`, latents along `latent`."""

    data: int = 1
    latent: int = 1

    def __post_init__(self):
        if self.data < 1 or self.latent < 1:
            raise ValueError(f"both axes of a mesh must be at least 1, got {self}")

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.data * self.latent

    def __str__(self) -> str:
        return f"data={self.data},latent={self.latent}"


class Mesh(Shards):
    """Processes of torch.distributed's default group, arranged on two axes.

    Rank r has place r // latent on the data axis and r % latent on the latent axis. All processes
    must make the same calls in the same order. Sums have the same bits on every process; those of a
    batch do not depend on `data`.
    """

    def __init__(
        self,
        axes: Axes,
        device: torch.device | str = "cpu",
        ranks: Sequence[int] | None = None,
    ):
        """Makes the groups of both axes, for tensors on `device`; ValueError unless there are as
        many processes. They are those of the ascending `ranks` (default: all), which make the mesh
        at once; its own ranks count from 0."""
        self.ranks = [*range(dist.get_world_size())] if ranks is None else [*ranks]
        self.size = len(self.ranks)
        if axes.size != self.size:
            raise ValueError(
                f"a mesh of {axes} takes {axes.size} processes, but there are {self.size}"
            )
        self.axes, self.rank, self.device = axes, self.ranks.index(dist.get_rank()), device
        self.data, self.latent = axes.data, axes.latent
        self.data_rank, self.latent_rank = divmod(self.rank, axes.latent)
        grid = torch.tensor(self.ranks).view(axes.data, axes.latent)
        self.along_latent = _group_of(grid[self.data_rank].tolist())
        self.along_data = _group_of(grid[:, self.latent_rank].tolist())
        # In the memory of the CPU; here, processes may wait for long.
        self.control = channel = GroupChannel(self.ranks)
        self.everyone = channel.group

    def rows(self, d_sae: int) -> slice:
        if d_sae % self.latent:
            raise ValueError(
                f"d_sae must be divisible by the latent axis, got {d_sae} and {self.axes}"
            )
        share = d_sae // self.latent
        return slice(self.latent_rank * share, (self.latent_rank + 1) * share)

    # --- tokens ------------------------------------------------------------------------------

    def gather_tokens(self, own: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "N ..."]:
        rows = gather(gather(own, self.along_data), self.along_latent)  # [latent, data, n, ...]
        return rows.transpose(0, 1).flatten(0, 2)

    def own_tokens(self, x: Shaped[Tensor, "N ..."]) -> Shaped[Tensor, "M ..."]:
        return x.chunk(self.data)[self.data_rank] if self.data > 1 else x

    def gather_data(self, own: Shaped[Tensor, "M ..."]) -> Shaped[Tensor, "N ..."]:
        return gather(own, self.along_data).flatten(0, 1)

    def gather_entries(self, *own: Shaped[Tensor, "M K"]) -> tuple[Shaped[Tensor, "N widest"], ...]:
        if self.data == 1:
            return own
        width = widest(own[0], self.along_data)
        return tuple(self.gather_data(pad(x, (0, width - x.shape[1]))) for x in own)

    def sum_data(self, part: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        return total(part, self.along_data)

    # --- latents -----------------------------------------------------------------------------

    def keep_best(self, codes: Codes, k: int, by: By, widest: int | None = None) -> Codes:
        if self.latent == 1:
            return codes
        sizes = codes.values.detach()
        sizes = sizes.abs() if by == "abs" else sizes
        if widest is not None:
            sizes = pad(sizes, (0, widest - sizes.shape[1]), value=-torch.inf)
        counts = kept_counts(sizes, k, self.along_latent)
        width = min(longest(counts), codes.values.shape[1])
        kept = torch.arange(width, device=counts.device) < counts[:, None]
        values = codes.values[:, :width].where(kept, 0.0)
        return Codes(values, codes.latents()[:, :width], codes.d_sae)

    def keep_best_of_batch(self, codes: Codes, k: int, by: By, differ: bool) -> Codes:
        sizes = codes.values.detach()
        sizes = (sizes.abs() if by == "abs" else sizes).clamp_min(0)
        count = self.count if differ else partial(total, group=self.along_latent)
        least, room = batch_threshold(sizes[sizes > 0], k, count)
        kept, equal = sizes > least, (sizes == least) & (sizes > 0)
        ties = count(equal.sum()[None])
        if int(ties) <= room:
            kept = kept | equal
        else:  # by their places in the whole batch
            token, entry = equal.nonzero(as_tuple=True)
            latent = codes.latents()[token, entry] + self.latent_rank * codes.d_sae
            before = self.data_rank * len(sizes) if differ else 0
            places = (token + before) * codes.d_sae * self.latent + latent
            every = self.all_of(places.tolist())
            last = sorted(sum(every if differ else every[: self.latent], []))[room - 1]
            kept[token, entry] = places <= last
        return codes._replace(values=codes.values.where(kept, 0.0))

    def count(self, own: Shaped[Tensor, " n"]) -> Shaped[Tensor, " n"]:
        """The sum of everyone's integers."""
        return self.sum_data(total(own, self.along_latent))

    def smallest(self, own: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return gather(own, self.along_latent).amin(0)

    def gather_latents(self, own: Shaped[Tensor, "share ..."]) -> Shaped[Tensor, "d_sae ..."]:
        return gather(own, self.along_latent).flatten(0, 1)

    def counts(self, own: int) -> tuple[int, ...]:
        return tuple(gather(torch.tensor(own, device=self.device), self.along_latent).tolist())

    def total(self, part: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        return part if self.latent == 1 else Total.apply(part, self.along_latent)

    def spread(self, whole: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return whole if self.latent == 1 else Spread.apply(whole, self.along_latent)

    def squared_error(
        self,
        codes: Codes,
        W_dec: Float[Tensor, "d_sae d_out"],
        b_dec: Float[Tensor, " d_out"],
        target: Float[Tensor, "M d_out"],
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, "N d_out"], Float[Tensor, "M K"]]:
        """Every process decodes its own entries, adds up a share of the tokens, and tells all."""
        if self.latent == 1:
            sse, error, dots = squared_error(codes.values, codes.latents(), W_dec, b_dec, target)
            return self.gather_data(sse), self.gather_data(error), dots
        part = decode(codes.values, codes.latents(), W_dec)
        part = part.to(torch.promote_types(part.dtype, torch.float32))
        own = sum_shares(part, self.along_latent) + b_dec
        share = slice(self.latent_rank * len(own), (self.latent_rank + 1) * len(own))
        own -= target[share]
        sse = self.gather_tokens(torch.linalg.vecdot(own, own))
        error = gather(own, self.along_latent).flatten(0, 1)
        dots = gather_dot(error, codes.latents(), W_dec)
        # Between nodes, each process sends the tokens that it alone has added up.
        low = error if self.data == 1 else self.gather_tokens(own.to(W_dec.dtype))
        return sse, low.to(W_dec.dtype), dots

    def below(self, d_sae: int, own: int) -> int:
        return min(max(d_sae - self.latent_rank * own, 0), own)

    # --- agreement ---------------------------------------------------------------------------

    def all_of(self, value: Anything) -> list[Anything]:
        begin(self.everyone)
        found: list = [None] * self.size
        dist.all_gather_object(found, value, group=self.everyone)
        return found

    @contextmanager
    def apart(self) -> Iterator[None]:
        first = True

        def tell(group: Group) -> None:
            # On two axes, places on one may differ in how often they exchange along the other.
            nonlocal first
            if first or size_of(group) == self.size:
                first = False
                self._agree(CALLS)

        token = before_collectives.set(tell)
        try:
            yield
        finally:
            before_collectives.reset(token)

    def together(self, own: bool) -> bool:
        return bool(self._agree(int(own)))

    def _agree(self, own: int) -> int:
        """The largest of all; ValueError if some, but not all, are CALLS."""
        token = before_collectives.set(None)
        every = self.control.rows_of_all(torch.tensor([own]), [1] * self.size)
        before_collectives.reset(token)
        callers = [rank for rank, (said,) in enumerate(every) if said == CALLS]
        if 0 < len(callers) < self.size:
            others = [rank for rank in range(self.size) if rank not in callers]
            raise ValueError(
                f"processes {callers} call in a callback what all must call at once, such as an "
                f"evaluation, and processes {others} do not: call it on every process"
            )
        return max(int(said) for (said,) in every)

    def channel(self) -> GroupChannel:
        return GroupChannel(self.ranks)

    def part(self, data: int, latent: int) -> Shards:
        axes = Axes(data, latent)
        if self.size % axes.size:
            raise ValueError(
                f"meshes of {axes} must divide the processes, got {self.size}, which "
                f"{axes.size} does not divide"
            )
        if axes.size == 1:
            return ONE_PROCESS
        start = self.rank - self.rank % axes.size
        return Mesh(axes, self.device, self.ranks[start:][: axes.size])


def _group_of(ranks: list[int]) -> Group:
    """The process group of these ranks; None if this process is alone."""
    return new_group(ranks) if len(ranks) > 1 else None
