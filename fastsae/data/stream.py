"""Activations to train on straight from a producer: nothing is stored."""

import copy
import hashlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from fastsae.data.arrays import ActivationArray
from fastsae.data.joined import Joined
from fastsae.data.mixing import DOCUMENT, SHARES, Mixer, Tally, effective_number
from fastsae.data.prefetch import Batches
from fastsae.data.producer import ModelProducer, Producer
from fastsae.data.production import HELDOUT_TOKENS, Production, named, skipped_rows
from fastsae.data.shuffle import Cursor
from fastsae.data.source import ActivationSource, StoredActivations
from fastsae.shards import Shards

BUFFER_TOKENS, BUFFER_CONTEXTS = 1 << 19, 512
"""The default size of a buffer is the larger of the two."""


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
        self._production = Production(producer, buffer_tokens, self.tally)
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

    def divide(self, shards: Shards) -> None:
        """Have the processes of a mesh divide the work of a `ModelProducer`; any other producer
        makes all rows in every process. Each has a buffer of its own with all rows."""
        if isinstance(self.producer, ModelProducer):
            self.producer.divide(shards)

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
        skipped = skipped_rows(self.producer)
        nulls = f"; {skipped:,} rows without text were skipped" if skipped else ""
        return (
            f"stream: {tally.produced:,} tokens produced, {drawn:,} drawn for training, "
            f"{tally.produced - drawn:,} left in the buffer or in batches loaded ahead; "
            f"of {seconds:,.0f} s, {shares[0]:.0%} in the model, {shares[1]:.0%} in the buffer"
            f"{nulls}"
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
        """The row's document, and its position in its window; of rows without contexts, the place
        where its group begins, and its number in the group."""
        return named(row)

    def sample(self, n: int, seed: int = 0) -> Float32[Tensor, "_ d_in"]:
        """`n` distinct rows of the first block, or all if there are fewer."""
        made = self._production
        if made.first is None:
            made.first = made.block(0, ())
        places = torch.cat(made.first.places)
        generator = np.random.Generator(np.random.PCG64(seed))
        drawn = generator.choice(len(places), min(n, len(places)), replace=False)
        picked = made.first.store.pick(places[torch.from_numpy(drawn)])
        return torch.cat([picked.rows[column].float() for column in self.columns], 1)

    def batches(
        self, batch_size: int, seed: int = 0, cursor: Cursor | None = None, pin_memory: bool = False
    ) -> Batches:
        """See `ActivationSource`."""
        if cursor is not None and cursor.epoch >= len(SHARES):
            self._production.first = None  # it was for a sample alone
        self._production.told = False
        mixer = Mixer(
            *(self._production.block, self.columns, seed, self.tally, batch_size, pin_memory),
            close=self._production.end,
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
        about = {"model": source.model, "hookpoint": source.hookpoint, "harvest": source.harvest}
        return ActivationArray(source.sample(HELDOUT_TOKENS, seed=1), **about)
    if not isinstance(source, StoredActivations):
        raise ValueError(f"{type(source).__name__} has no held-out rows to evaluate on")
    return source
