"""Activations to train on straight from a producer: nothing is stored."""

import copy
import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from fastsae.data.arrays import ActivationArray
from fastsae.data.joined import Joined
from fastsae.data.mixing import BLOCKS_HELD, DOCUMENT, SHARES, Chunk, Mixer, Tally, effective_number
from fastsae.data.prefetch import Batches
from fastsae.data.producer import Group, Place, Producer
from fastsae.data.shuffle import Cursor
from fastsae.data.source import ActivationSource, Contexts, StoredActivations
from fastsae.progress import say

BUFFER_TOKENS, BUFFER_CONTEXTS = 1 << 19, 512
"""The default size of a buffer is the larger of the two."""
HELDOUT_TOKENS = 65_536
"""Rows that are kept for evaluation."""


class Stopped(Exception):
    """Ends the production of a block that nobody waits for any more."""


class _Production:
    """The blocks of a producer, in order, and what is kept of them."""

    def __init__(self, producer: Producer, block_tokens: int, tally: Tally):
        self.producer, self.block_tokens, self.tally = producer, block_tokens, tally
        self.first: tuple[list[Chunk], Place] | None = None
        """Block 0, from when it is sampled until it goes into a buffer."""
        self._heldout: tuple[list[Tensor], Contexts | None] | None = None
        self._groups: Iterator[Group] | None = None
        self._at: Place = ()
        self._made = 0
        self._empty = True
        """Whether no rows have come since the beginning of the data."""
        self._again = False

    def block(
        self, number: int, start: Place, stopped: Callable[[], bool] = lambda: False
    ) -> tuple[list[Chunk], Place]:
        """The block of a number, which begins at a place, and where the next one begins."""
        if number == 0 and self.first is not None:
            first, self.first = self.first, None
            return first
        if self._groups is None or self._at != start:
            self._groups, self._at = self.producer.groups(start), start
            self._empty = not start
        chunks, size = list[Chunk](), 0
        while size < self.block_tokens:
            if stopped():
                raise Stopped
            before = time.perf_counter()
            group = next(self._groups, None)
            self.tally.model_seconds += time.perf_counter() - before
            if group is None:
                self._begin_again()
                if chunks:
                    break
                continue
            self._at = group.next
            if len(group.rows[0]):
                self._empty = False
                chunks.append(self._chunk(group))
                size += len(chunks[-1].numbers)
        return chunks, self._at

    def heldout(self) -> tuple[list[Tensor], Contexts | None]:
        """The first held-out rows at each hookpoint, and their contexts if they are known."""
        if self._heldout is None:
            rows = [[torch.empty(0, width)] for width in self.producer.widths.values()]
            contexts, left = list[Contexts | None](), HELDOUT_TOKENS
            groups = self.producer.groups((), "heldout")
            while left > 0 and (group := next(groups, None)) is not None:
                for kept, x in zip(rows, self._chunk(group).rows, strict=True):
                    kept.append(x[:left])
                contexts.append(group.contexts)
                left -= len(group.rows[0])
            whole = [torch.cat(parts[1:] or parts) for parts in rows]
            known = [context for context in contexts if context is not None]
            labels = [torch.cat(parts)[: len(whole[0])] for parts in zip(*known, strict=True)]
            self._heldout = whole, Contexts(*labels) if labels else None
        return self._heldout

    def _begin_again(self) -> None:
        if self._empty:
            raise ValueError("the stream has no tokens")
        if not self._again:
            text = "the stream has come to its end and begins again: its tokens are seen repeatedly"
            say(text, logging.WARNING)
            self._again = True
        self._groups, self._at, self._empty = self.producer.groups(()), (), True

    def _chunk(self, group: Group) -> Chunk:
        """A group's rows with their numbers; ValueError if they do not fit."""
        size = len(group.rows[0])
        self._made += 1
        if group.contexts is None:  # then a group counts as a document
            numbers = self._made * DOCUMENT + torch.arange(size)
        else:
            numbers = group.contexts.documents * DOCUMENT + group.contexts.positions
        for (name, width), rows in zip(self.producer.widths.items(), group.rows, strict=True):
            if rows.shape != (size, width):
                shape = tuple(rows.shape)
                raise ValueError(f"{name}: rows must be of shape {(size, width)}, got {shape}")
            if not rows.isfinite().all():
                bad = int((~rows.isfinite().all(1)).nonzero()[0])
                raise ValueError(f"{name} holds NaN or Inf: {named(int(numbers[bad]))}")
        chunk = Chunk(tuple(rows.to("cpu") for rows in group.rows), numbers)
        self.tally.token_bytes = sum(x.shape[1] * x.itemsize for x in chunk.rows)
        return chunk


class Stream:
    """An `ActivationSource` whose rows a producer makes while training goes on.

    Rows of a document come together, so a buffer mixes them (see `Mixer`). There is no end: after
    the last document comes the first one again, in another order. Batches are the same for the same
    producer, buffer and seed, and continue after a cursor once the rows in the buffer are produced
    again.

    Args:
        producer: makes the rows. With several hookpoints, a row is theirs side by side.
        buffer_tokens: rows in the buffer. More of them mix more documents in each batch.
        model, harvest: the model's name and the settings of windows, with which evaluation runs it.

    Raises ValueError for a buffer of less than 2 tokens.
    """

    n_tokens = None
    """Unknown."""

    def __init__(
        self,
        producer: Producer,
        buffer_tokens: int = BUFFER_TOKENS,
        *,
        model: str | None = None,
        harvest: dict[str, Any] | None = None,
    ):
        if buffer_tokens < 2:
            raise ValueError(f"buffer_tokens must be at least 2, got {buffer_tokens}")
        self.producer, self.buffer_tokens = producer, buffer_tokens
        self.model, self.harvest = model, harvest or {}
        self.tally = Tally()
        block_tokens = max(1, int(buffer_tokens / BLOCKS_HELD))
        self._production = _Production(producer, block_tokens, self.tally)
        self._select(tuple(producer.widths))

    def _select(self, hookpoints: tuple[str, ...]) -> None:
        names = [*self.producer.widths]
        self.hookpoints = hookpoints
        self._heldout: tuple[ActivationArray | Joined | None, ...] = ()
        """What is held out, once it is known."""
        self.columns = [names.index(name) for name in hookpoints]
        self.widths = tuple(self.producer.widths[name] for name in hookpoints)
        self.d_in = sum(self.widths)
        about = self.producer.fingerprint, hookpoints, self.buffer_tokens
        self.fingerprint = hashlib.sha256(repr(about).encode()).hexdigest()[:16]

    def select(self, *hookpoints: str) -> "Stream":
        """The same stream with the rows of these hookpoints alone, side by side. It shares what is
        produced: batches are to be drawn from one of such streams at a time."""
        view = copy.copy(self)
        view._select(hookpoints)
        return view

    def part(self, x: Float32[Tensor, "N _"], hookpoints: Sequence[str]) -> Float32[Tensor, "N _"]:
        """The columns of some hookpoints in a batch of this stream."""
        parts = dict(zip(self.hookpoints, x.split(self.widths, dim=1), strict=True))
        return torch.cat([parts[name] for name in hookpoints], 1)

    @property
    def hookpoint(self) -> str | None:
        """The hookpoint, if there is one."""
        return self.hookpoints[0] if len(self.hookpoints) == 1 else None

    @property
    def heldout(self) -> "ActivationArray | Joined | None":
        """Up to 65,536 rows that were held out, from the first documents. They are produced when
        they are first asked for. None if nothing is held out."""
        if not self._heldout:
            self._heldout = (self._held_out(),)
        return self._heldout[0]

    def _held_out(self) -> "ActivationArray | Joined | None":
        rows, contexts = self._production.heldout()
        if not len(rows[0]):
            return None
        arrays = [
            ActivationArray(
                rows[column],
                contexts,
                model=self.model,
                hookpoint=hookpoint,
                harvest=self.harvest,
            )
            for column, hookpoint in zip(self.columns, self.hookpoints, strict=True)
        ]
        return arrays[0] if len(arrays) == 1 else Joined(*arrays)

    def describe(self) -> str:
        """The buffer, in one line, once there are rows."""
        size = self.buffer_tokens * self.tally.token_bytes / 1e6
        return f"buffer of {self.buffer_tokens:,} tokens ({size:,.3g} MB), which mixes documents"

    def report(self, drawn: int) -> str:
        """What became of the tokens of a run that has drawn so many, and of its time."""
        tally, seconds = self.tally, time.perf_counter() - self.tally.began
        shares = tally.model_seconds / seconds, tally.copy_seconds / seconds
        return (
            f"stream: {tally.produced:,} tokens produced, {drawn:,} drawn for training, "
            f"{tally.produced - drawn:,} left in the buffer or in batches loaded ahead; "
            f"of {seconds:,.0f} s, {shares[0]:.0%} in the model, {shares[1]:.0%} in the buffer"
        )

    def readings(self, rows: Int64[np.ndarray, " N"]) -> dict[str, float]:
        """Numbers for the log: the effective number of documents in a batch of these rows, and the
        time spent so far in the model and in the buffer."""
        return {
            "documents_per_batch": effective_number(rows // DOCUMENT),
            "model_seconds": self.tally.model_seconds,
            "copy_seconds": self.tally.copy_seconds,
        }

    def where(self, row: int) -> str:
        """The row's document, and its position in its window."""
        return named(row)

    def sample(self, n: int, seed: int = 0) -> Float32[Tensor, "_ d_in"]:
        """`n` distinct rows of the first block, or all if there are fewer."""
        made = self._production
        if made.first is None:
            made.first = made.block(0, ())
        chunks, _ = made.first
        ends = np.cumsum([len(chunk.numbers) for chunk in chunks])
        generator = np.random.Generator(np.random.PCG64(seed))
        rows = generator.choice(ends[-1], min(n, ends[-1]), replace=False)
        out = torch.empty(len(rows), self.d_in)
        for end, chunk in zip(ends, chunks, strict=True):
            start = end - len(chunk.numbers)
            places = np.flatnonzero((start <= rows) & (rows < end))
            picked = chunk.pick(torch.from_numpy(rows[places] - start))
            out[places] = torch.cat([picked.rows[c].float() for c in self.columns], 1)
        return out

    def batches(
        self, batch_size: int, seed: int = 0, cursor: Cursor | None = None, pin_memory: bool = False
    ) -> Batches:
        """See `ActivationSource`."""
        if cursor is not None and cursor.epoch >= len(SHARES):
            self._production.first = None  # it was for a sample alone
        mixer = Mixer(
            self._production.block, self.columns, seed, self.tally, batch_size, pin_memory
        )
        return Batches(mixer, cursor)


def check_evaluable(source: ActivationSource) -> None:
    """ValueError unless a source has rows to evaluate on. A stream does; it produces them later."""
    if isinstance(source, Stream):
        return
    heldout, name = source.heldout, type(source).__name__
    if heldout is None and not hasattr(source, "rows"):
        raise ValueError(f"{name} has nothing to evaluate on: it needs heldout rows, or rows()")
    if heldout is not None and not hasattr(heldout, "rows"):
        raise ValueError(f"{name}.heldout must have rows(), got {type(heldout).__name__}")


def stored(source: ActivationSource) -> StoredActivations:
    """Rows to evaluate on where none are held out: all, or of a stream a sample."""
    if isinstance(source, Stream):
        return ActivationArray(source.sample(HELDOUT_TOKENS, seed=1))
    if not isinstance(source, StoredActivations):
        raise ValueError(f"{type(source).__name__} has no held-out rows to evaluate on")
    return source


def named(row: int) -> str:
    document, position = divmod(row, DOCUMENT)
    return f"document {document}, position {position}"
