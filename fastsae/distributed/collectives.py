"""Collectives that move bytes and add in rank order, so that sums have the same bits every time.

The sums of a communication library may come in any order; these are of our own: every process
receives its share of all parts and adds them by rank. In a group of 1 nothing is sent.
Shapes: R ranks of the group.
"""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

Group = dist.ProcessGroup | None
"""None stands for this process alone."""

before_collectives: ContextVar[Callable[[Group], None] | None]
before_collectives = ContextVar("before_collectives", default=None)
"""What this thread calls before each collective, with its group."""

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""By its name from torch 2.13 on, or the one before."""


def new_group(ranks: Sequence[int], **settings: Any) -> dist.ProcessGroup:
    """A group of these ranks, ascending and this one among them. They make it at once; the others
    need not take part, if all processes have made as many groups before."""
    group = dist.new_group(ranks, use_local_synchronization=True, **settings)
    assert isinstance(group, dist.ProcessGroup), "this process is in it"
    return group


def size_of(group: Group) -> int:
    return 1 if group is None else group.size()


def begin(group: Group) -> None:
    """To be called before a collective that sends something."""
    if act := before_collectives.get():
        act(group)


def gather(own: Shaped[Tensor, "..."], group: Group) -> Shaped[Tensor, "R ..."]:
    """Everyone's tensor, by rank; all have one shape and dtype."""
    if group is None:
        return own[None]
    begin(group)
    sent = _sendable(own, group)
    found = sent.new_empty(group.size(), *own.shape)
    _all_gather(_bytes(found), _bytes(sent), group=group)
    return found.to(own.device)


def exchange(parts: Shaped[Tensor, "R ..."], group: Group) -> Shaped[Tensor, "R ..."]:
    """Part r goes to rank r; what each rank sent to this one, by rank."""
    if group is None:
        return parts
    begin(group)
    sent = _sendable(parts, group)
    found = torch.empty_like(sent)
    dist.all_to_all_single(_bytes(found), _bytes(sent), group=group)
    return found.to(parts.device)


def _sendable(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x in memory that the group's library sends from: of gloo, the CPU's."""
    return (x.cpu() if x.is_cuda and dist.get_backend(group) == "gloo" else x).contiguous()


def _bytes(x: Tensor) -> Tensor:
    """The same memory as bytes, which every library moves."""
    return x.view(-1).view(torch.uint8)


def padded(x: Shaped[Tensor, "N ..."], rows: int, value: float = 0.0) -> Shaped[Tensor, "M ..."]:
    """x with rows of this value behind it, up to `rows` of them."""
    if len(x) == rows:
        return x
    return torch.cat((x, x.new_full((rows - len(x), *x.shape[1:]), value)))


def shares(x: Shaped[Tensor, "N ..."], n: int, value: float = 0.0) -> Shaped[Tensor, "n M ..."]:
    """x in n equal parts, the last of them padded."""
    rows = -(-len(x) // n)
    return padded(x, n * rows, value).unflatten(0, (n, rows))


def sum_shares(part: Shaped[Tensor, "N ..."], group: Group) -> Shaped[Tensor, "M ..."]:
    """This rank's share of the sum of everyone's part: a reduce-scatter in rank order."""
    parts = exchange(shares(part, size_of(group)), group)
    return reduce(torch.add, parts) if len(parts) > 1 else parts[0]


def total(part: Shaped[Tensor, "..."], group: Group) -> Shaped[Tensor, "..."]:
    """The sum of everyone's part, the same bits for all: an all-reduce in rank order."""
    if group is None:
        return part
    whole = gather(sum_shares(part.reshape(-1), group), group)
    return whole.view(-1)[: part.numel()].view(part.shape)


class Total(torch.autograd.Function):
    """`total`, for parts on which all ranks have the same gradient."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Group) -> Tensor:
        return total(part, group)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        return g, None


class Spread(torch.autograd.Function):
    """The identity, for what all ranks have and use differently: its gradient is their sum."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        return total(g, ctx.group), None
