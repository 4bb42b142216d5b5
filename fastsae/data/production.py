"""The rows that a producer makes, in blocks for a buffer, and those held out."""

import logging
import time
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Int64
from torch import Tensor

from fastsae.data.mixing import BLOCKS_HELD, DOCUMENT, Block, Tally
from fastsae.data.producer import Group, ModelProducer, Place, Producer
from fastsae.data.source import Contexts
from fastsae.data.store import PIECE_BYTES, PIECES, Chunk, Store
from fastsae.progress import say
from fastsae.shards import Channel

HELDOUT_TOKENS = 65_536
"""Rows that are kept for evaluation."""


class Stopped(Exception):
    """Ends the production of a block that nobody waits for any more."""


class Production:
    """The blocks of a producer, in order, and what is kept of them."""

    def __init__(self, producer: Producer, buffer_tokens: int, tally: Tally):
        self.producer, self.tally = producer, tally
        self.block_tokens = max(1, int(buffer_tokens / BLOCKS_HELD))
        row_bytes = 4 * sum(producer.widths.values())
        self.piece_tokens = max(1, min(-(-buffer_tokens // PIECES), PIECE_BYTES // row_bytes))
        self.first: Block | None = None
        """Block 0, from when it is sampled until it goes into a buffer."""
        self._heldout: tuple[list[Tensor], Contexts | None] | None = None
        self._groups: Iterator[Group] | None = None
        self._at: Place = ()
        self._empty = True
        """Whether no rows have come since the beginning of the data."""
        self._again = False
        self.told = False
        """Whether some process has told all that it wants no more."""

    def end(self) -> None:
        """Tell the processes that divide the model's work that no more blocks are wanted. All of
        them say so, once: one that waits for the others in `block` then stops too."""
        if not self.told:
            self.channel.largest(True)

    @property
    def channel(self) -> Channel:
        """How the processes that divide the model's work talk to each other, if any do."""
        producer = self.producer
        return producer.channel("train") if isinstance(producer, ModelProducer) else Channel()

    def block(
        self,
        number: int,
        start: Place,
        store: Store | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Block:
        """The block of a number, which begins at a place, in the store that there is, or a new
        one."""
        if number == 0 and self.first is not None:
            first, self.first = self.first, None
            return first
        if self._groups is None or self._at != start:
            self._groups, self._at = self.producer.groups(start), start
            self._empty = not start
        block = Block(store or Store(self.piece_tokens), [], ())
        size = largest = 0
        while not size or size + largest <= self.block_tokens:
            if self.channel.largest(stopped()):
                self.told = True
                raise Stopped
            places = self._next_group(block.store)
            if places is None:
                self._begin_again()
                if size:
                    break
            elif n := len(places):
                size, largest = size + n, max(largest, n)
                block.places.append(places)
        return block._replace(next=self._at)

    def _next_group(self, store: Store) -> Int64[Tensor, " _"] | None:
        """Put the next group into the store; None at the end of the data."""
        assert self._groups is not None, "begun by block"
        before = time.perf_counter()
        group = next(self._groups, None)
        self.tally.model_seconds += time.perf_counter() - before
        if group is None:
            return None
        chunk, self._at = self._chunk(group, self._at), group.next
        self._empty = self._empty and not len(chunk.numbers)
        before = time.perf_counter()
        places = store.put(chunk)
        self.tally.copy_seconds += time.perf_counter() - before
        return places

    def heldout(self) -> tuple[list[Tensor], Contexts | None]:
        """The first held-out rows at each hookpoint, and their contexts if they are known."""
        if self._heldout is None:
            rows = [[torch.empty(0, width)] for width in self.producer.widths.values()]
            contexts, left = list[Contexts | None](), HELDOUT_TOKENS
            groups, start = self.producer.groups((), "heldout"), ()
            while left > 0 and (group := next(groups, None)) is not None:
                for kept, x in zip(rows, self._chunk(group, start).rows, strict=True):
                    kept.append(x[:left])
                start = group.next
                contexts.append(group.contexts)
                left -= len(group.rows[0])
            whole = [torch.cat(parts[1:] or parts) for parts in rows]
            known = [context for context in contexts if context is not None]
            labels = [torch.cat(parts)[: len(whole[0])] for parts in zip(*known, strict=True)]
            self._heldout = whole, Contexts(*labels) if labels else None
        return self._heldout

    def _begin_again(self) -> None:
        if self._empty:
            skipped = skipped_rows(self.producer)
            nulls = f" ({skipped} rows are null)" if skipped else ""
            raise ValueError(f"the stream has no tokens{nulls}")
        if not self._again and self.channel.rank == 0:
            text = "the stream has come to its end and begins again: its tokens are seen repeatedly"
            say(text, logging.WARNING)
        self._again = True
        self._groups, self._at, self._empty = self.producer.groups(()), (), True

    def _chunk(self, group: Group, start: Place) -> Chunk:
        """The rows of a group from a place on, with their numbers; ValueError if they do not
        fit."""
        size = len(group.rows[0])
        if group.contexts is None:
            numbers = -1 - (start or (0,))[0] * DOCUMENT - torch.arange(size)
        else:
            numbers = group.contexts.documents * DOCUMENT + group.contexts.positions
        for (name, width), rows in zip(self.producer.widths.items(), group.rows, strict=True):
            if rows.shape != (size, width):
                shape = tuple(rows.shape)
                raise ValueError(f"{name}: rows must be of shape {(size, width)}, got {shape}")
            if not group.finite and not (finite := rows.isfinite().all(1)).all():
                bad = int(numbers[finite.byte().argmin()])
                raise ValueError(f"{name} holds NaN or Inf: {named(bad)}")
        chunk = Chunk(tuple(rows.to("cpu") for rows in group.rows), numbers)
        self.tally.token_bytes = sum(x.shape[1] * x.itemsize for x in chunk.rows)
        return chunk


def skipped_rows(producer: Producer) -> int:
    """Rows without text that a producer has passed over."""
    return producer.skipped_rows if isinstance(producer, ModelProducer) else 0


def named(row: int) -> str:
    """What the number of a row says. Rows without contexts have negative numbers."""
    document, position = divmod(row if row >= 0 else -1 - row, DOCUMENT)
    if row < 0:
        return f"row {position} of the group from place {document} on"
    return f"document {document}, position {position}"
