"""A model's work, divided among processes that all need its results."""

from collections.abc import Callable
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from fastsae.shards import Channel

Anything = TypeVar("Anything")


def raise_on_all(error: Exception | None, channel: Channel) -> None:
    """Raise the error, if there is one, and on all other processes a ValueError with its text. All
    call it at once."""
    told = (str(error) or repr(error)).encode()[:1000] if error else b""
    if size := channel.largest(len(told)):
        own = torch.tensor([*told.ljust(size, b"\0")], dtype=torch.uint8)
        texts = [bytes(text.tolist()) for text in channel.rows_of_all(own, [size] * channel.size)]
        text = next(filter(None, (text.rstrip(b"\0") for text in texts))).decode("utf-8", "replace")
        raise error or ValueError(f"another process could not make activations: {text}")


def read_alike(read: Callable[[], Anything], channel: Channel) -> Anything:
    """What read() returns. If it fails in one process, all raise: the others in `run_dealt`."""
    try:
        return read()
    except Exception as error:
        raise_on_all(error, channel)
        raise


def run_dealt(
    run: Callable[[], list[Float[Tensor, "N _"]]],
    ends: list[int],
    dealt: list[list[int]],
    channel: Channel,
) -> list[Float[Tensor, "N _"]]:
    """The rows of every window at each hookpoint. `run` returns them with those of the windows
    dealt to this process; `ends` says where the rows of each window end. If `run` fails in one
    process, all raise."""
    if channel.size == 1:
        return run()
    rows, error = list[Tensor](), None
    try:
        rows = run()
    except Exception as raised:  # told to the other processes, then raised
        error = raised
    raise_on_all(error, channel)
    slices = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    places = [
        torch.cat([torch.arange(0), *(torch.arange(slices[i].start, slices[i].stop) for i in own)])
        for own in dealt
    ]
    for whole in rows:
        own = whole[places[channel.rank]]
        for place, found in zip(places, channel.rows_of_all(own, [*map(len, places)]), strict=True):
            whole[place] = found
    return rows
