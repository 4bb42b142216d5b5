"""A buffer that mixes rows which are produced in order.

It is filled by blocks. A turn draws half of the newest block's rows, and those left for it of the
three blocks before: a quarter, an eighth and an eighth. So every row is drawn once, within four
turns, and what a turn draws follows from the seed and these four blocks: an interrupted run resumes
after producing them again.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from fastsae.data.prefetch import Batch
from fastsae.data.producer import Place
from fastsae.data.shuffle import Cursor, permutation
from fastsae.data.store import Chunk, Store

SHARES = 4, 2, 1, 1
"""Eighths of a block's rows that are drawn in its own turn and in each of the three after it."""
BLOCKS_HELD = 15 / 8
"""Blocks in the buffer at the beginning of a turn."""
_NOWHERE = torch.empty(0, dtype=torch.int64)
DOCUMENT = 1 << 32
"""A row's number is its document's times this, plus the row's position in its window of text.
Without contexts, it is -1 minus the first number of the place where its group begins times this,
minus the row's number in the group."""


class Block(NamedTuple):
    """The rows of a turn of production."""

    store: Store
    places: list[Int64[Tensor, " _"]]
    """Where they are in the store, by the groups that they came in."""
    next: Place
    """Where the next block begins."""


@dataclass
class Tally:
    """What the mixing of a stream has done so far, and how long it took."""

    produced: int = 0
    """Rows, those of earlier runs included."""
    began: float = field(default_factory=time.perf_counter)
    model_seconds: float = 0.0
    copy_seconds: float = 0.0
    token_bytes: int = 0


@dataclass
class Mixer:
    """Builds the batches of a stream from its blocks, as a `BatchLoader`."""

    produce: Callable[[int, Place, Store | None, Callable[[], bool]], Block]
    """The block of a number, which begins at a place, put into a store if there is one already."""
    columns: Sequence[int]
    """Hookpoints whose rows are wanted, side by side."""
    seed: int
    tally: Tally
    batch_size: int
    pin_memory: bool = False

    turn: int = field(default=-1, init=False)
    """Whose rows are drawn; -1 before the first."""
    store: Store | None = field(default=None, init=False)
    order: Int64[Tensor, " N"] = field(default_factory=lambda: _NOWHERE, init=False)
    """The places of the turn's rows in the store, as they are drawn."""
    waiting: dict[int, list[Int64[Tensor, " _"]]] = field(default_factory=dict, init=False)
    """Those of later turns."""
    begins: list[tuple[Place, int]] = field(default_factory=list, init=False)
    """Where the blocks of this turn begin, oldest first, and the rows produced before each."""
    next: Place = field(default=(), init=False)

    def check(self, cursor: Cursor) -> None:
        if cursor.epoch < 0 or cursor.position < 0:
            raise ValueError(f"cursor {cursor[:2]} does not fit: turn and position start at 0")

    def batch(self, cursor: Cursor, stopped: Callable[[], bool]) -> Batch:
        if self.turn < 0:
            self.resume(cursor, stopped)
        position, parts, missing = cursor.position, list[Chunk](), self.batch_size
        while missing:
            if position == len(self.order):
                self.fill(stopped)
                position = 0
            places = self.order[position : position + missing]
            parts.append(self.timed(self.stored.pick, places))
            position += len(places)
            missing -= len(places)
        x = self.timed(self.side_by_side, parts)
        numbers = torch.cat([part.numbers for part in parts]).numpy()
        return Batch(x, Cursor(self.turn, position, *self.begins[0]), numbers)

    def resume(self, cursor: Cursor, stopped: Callable[[], bool]) -> None:
        """Produce the blocks with rows in the cursor's turn or later ones."""
        self.next, self.tally.produced = cursor.place, cursor.produced
        self.turn = max(0, cursor.epoch - len(SHARES) + 1) - 1
        while self.turn < cursor.epoch:
            self.fill(stopped)
        if cursor.position > len(self.order):
            raise ValueError(
                f"cursor {cursor[:2]} does not fit: the turn has {len(self.order)} rows"
            )

    @property
    def stored(self) -> Store:
        assert self.store is not None, "filled before a batch is drawn"
        return self.store

    def fill(self, stopped: Callable[[], bool]) -> None:
        """Put the next block in the places of the turn that was drawn, and begin its turn."""
        if self.store is not None:
            self.store.release(self.order)
            self.order = _NOWHERE
        self.turn += 1
        self.begins = [*self.begins, (self.next, self.tally.produced)][-len(SHARES) :]
        self.store, groups, self.next = self.produce(self.turn, self.next, self.store, stopped)
        self.timed(self.split, groups)
        places = torch.cat(self.waiting.pop(self.turn))
        self.order = places[torch.from_numpy(permutation(len(places), self.seed, self.turn, 0))]

    def split(self, groups: list[Int64[Tensor, " _"]]) -> None:
        """Draw the turn of each row of a block."""
        bounds = np.cumsum((0, *SHARES)) / sum(SHARES)
        for number, places in enumerate(groups, 1):
            self.tally.produced += len(places)
            order = permutation(len(places), self.seed, self.turn, number)
            cuts = np.round(bounds * len(order)).astype(int)
            for age in range(len(SHARES)):
                drawn = torch.from_numpy(order[cuts[age] : cuts[age + 1]])
                self.waiting.setdefault(self.turn + age, []).append(places[drawn])

    def side_by_side(self, parts: list[Chunk]) -> Float32[Tensor, "N D"]:
        columns = [torch.cat([part.rows[c] for part in parts]).float() for c in self.columns]
        x = columns[0] if len(columns) == 1 else torch.cat(columns, 1)
        return x.pin_memory() if self.pin_memory else x

    def timed(self, work: Callable, *arguments: object):
        start = time.perf_counter()
        result = work(*arguments)
        self.tally.copy_seconds += time.perf_counter() - start
        return result


def effective_number(labels: Int64[np.ndarray, " N"]) -> float:
    """exp of the entropy of the labels' shares: as many equal shares would have it."""
    share = np.unique(labels, return_counts=True)[1] / len(labels)
    return float(np.exp(-(share * np.log(share)).sum()))
