"""What the processes of a run agree on: that they make the same one, and when it ends."""

import hashlib
from collections.abc import Callable, Mapping

from fastsae.data import Batch
from fastsae.meeting import everywhere
from fastsae.shards import Shards

from .interrupt import Interrupts
from .state import TrainState

FAILED = 1 << 16
"""Above every signal's number."""


def check_same_run(shards: Shards, parts: Mapping[str, object]) -> None:
    """ValueError, naming what differs, unless the parts are the same on all processes."""
    digests = {
        name: hashlib.sha256(
            part if isinstance(part, bytes) else repr(part).encode("utf-8", "replace")
        ).hexdigest()
        for name, part in parts.items()
    }
    for rank, others in enumerate(shards.all_of(digests)):
        differ = [name for name, digest in digests.items() if others.get(name) != digest]
        if differ:
            raise ValueError(
                f"all processes must make the same run, but those of processes {shards.rank} and "
                f"{rank} differ in {', '.join(differ)}"
            )


def take_together(
    shards: Shards, take: Callable[[], Batch | None], interrupts: Interrupts
) -> tuple[Batch | None, int]:
    """The batch that `take` returns, or the number of a signal that any process has received.

    Each process waits for its data alone. An error of one is raised on all.
    """
    batch, error = None, None
    try:
        batch = take()
    except ValueError as raised:
        error = raised
    news = shards.largest(FAILED if error else interrupts.signum or 0)

    def check() -> None:
        if error is not None:
            raise error

    if news == FAILED:
        everywhere(shards, check)
    return batch, news


def end_together(shards: Shards, state: TrainState) -> None:
    """A run that a callback ended in one process has ended in all."""
    if shards.largest(state.stopped is not None):
        state.stopped = next(filter(None, shards.all_of(state.stopped)))
