"""What processes do apart and then agree on: where one fails, all raise, and none waits for it."""

from collections.abc import Callable
from typing import TypeVar

from fastsae.shards import Shards

Anything = TypeVar("Anything")

KINDS = {"ValueError": ValueError, "OSError": OSError, "RuntimeError": RuntimeError}


def everywhere(shards: Shards, act: Callable[[], Anything]) -> Anything:
    """What act() returns here, once it has returned on every process.

    If it raises on some, all raise what it raised on the lowest of them: that one its own
    exception, the others a ValueError, an OSError or else a RuntimeError that names its rank.
    """
    if shards.size == 1:
        return act()
    result = own = None
    try:
        result = act()
    except Exception as error:
        own = error
    failures = shards.all_of(None if own is None else (_kind(own), str(own) or repr(own)))
    for rank, failure in enumerate(failures):
        if failure is not None:
            if own is not None and rank == shards.rank:
                raise own
            kind, text = failure
            raise KINDS[kind](f"process {rank}: {text}") from own
    return result  # pyright: ignore[reportReturnType]


def all_results(shards: Shards, act: Callable[[], Anything]) -> list[Anything]:
    """What act() returns on every process, by rank: small Python objects. Raises what `everywhere`
    does."""
    return shards.all_of(everywhere(shards, act))


def on_first(shards: Shards, act: Callable[[], Anything]) -> Anything:
    """What act() returns on rank 0, which alone calls it: a small Python object. Raises what
    `everywhere` does."""
    return all_results(shards, lambda: act() if shards.rank == 0 else None)[0]  # pyright: ignore


def _kind(error: Exception) -> str:
    return next((name for name, kind in KINDS.items() if isinstance(error, kind)), "RuntimeError")
