"""What an op that is timed is: see ops.py for the table of them."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

from .clock import Cost
from .data import Problem


class Way(NamedTuple):
    """Another way to the same result; from the op's own arguments unless it makes others."""

    run: Callable[..., object]
    make: Callable[[Problem], tuple] | None = None
    shapes: str = "ABCD"


@dataclass(frozen=True, kw_only=True)
class Op:
    name: str
    group: str
    """Of its checks."""
    make: Callable[[Problem], tuple]
    run: Callable[..., object]
    cost: Callable[..., Cost]
    """From the problem and the arguments."""
    others: dict[str, Way] = field(default_factory=dict)
    around: Callable[[], AbstractContextManager] = nullcontext
    """What holds while it is timed."""


def simple(
    run: Callable[..., object],
    make: Callable[[Problem], tuple],
    cost: Callable[..., Cost],
    **others: Callable[..., object],
) -> Op:
    """An op named and checked as its function is."""
    ways = {name: Way(other) for name, other in others.items()}
    name = getattr(run, "__name__", "")
    return Op(name=name, group=name, make=make, run=run, cost=cost, others=ways)
