"""A shuffle with random access: the row at any position follows from the seed alone.

An epoch visits every row once. Rows are grouped into blocks of neighbors, which makes for long
reads from disk; the blocks are permuted; then the rows are permuted within windows of many blocks,
which bounds the data in use at a time. Permutations sort the raw output of Philox keyed by (seed,
epoch, window), so they do not depend on platform, thread count or global state.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int64


class Cursor(NamedTuple):
    """A position in the stream of rows: `position` rows of `epoch` have been drawn."""

    epoch: int = 0
    """Of a `Stream`, the turn."""
    position: int = 0
    place: tuple[int, ...] = ()
    """Of a `Stream`: where the oldest block with rows in its buffer begins."""
    produced: int = 0
    """Of a `Stream`: rows that were produced before that block."""


class Piece(NamedTuple):
    """Some rows of a window: `rows[picks]`, in this order. `rows` is the whole window, sorted."""

    window: tuple[int, int]
    rows: Int64[np.ndarray, " window"]
    picks: Int64[np.ndarray, " N"]


class Shuffle:
    """The order in which `n_rows` rows are visited, epoch after epoch."""

    def __init__(self, n_rows: int, seed: int, window_rows: int, block_rows: int = 64):
        if n_rows < 1:
            raise ValueError(f"cannot shuffle {n_rows} rows: at least 1 is needed")
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        self.n_rows = n_rows
        self.seed = seed
        self.block_rows = block_rows
        self.window_rows = max(1, window_rows // block_rows) * block_rows
        self._epoch: tuple[int, int, Int64[np.ndarray, " blocks"]] | None = None
        self._window: Piece | None = None

    def take(self, cursor: Cursor, n: int) -> tuple[list[Piece], Cursor]:
        """The next `n` rows after `cursor`, across epochs if needed, and the new cursor."""
        epoch, position, *_ = cursor
        if epoch < 0 or not 0 <= position < self.n_rows:
            raise ValueError(
                f"cursor {(epoch, position)} does not fit: epoch must be at least 0 and "
                f"position from 0 to {self.n_rows - 1}"
            )
        pieces: list[Piece] = []
        while n > 0:
            number, start = divmod(position, self.window_rows)
            window = self._whole_window(epoch, number)
            piece = window._replace(picks=window.picks[start : start + n])
            pieces.append(piece)
            n -= len(piece.picks)
            position += len(piece.picks)
            if position == self.n_rows:
                epoch, position = epoch + 1, 0
        return pieces, Cursor(epoch, position)

    def _whole_window(self, epoch: int, number: int) -> Piece:
        if self._window is None or self._window.window != (epoch, number):
            offset, blocks = self._epoch_blocks(epoch)
            per_window = self.window_rows // self.block_rows
            blocks = blocks[number * per_window :][:per_window]
            rows = (blocks[:, None] * self.block_rows + np.arange(self.block_rows)).ravel()
            rows = rows[rows < self.n_rows]  # the last block may be short
            picks = permutation(len(rows), self.seed, epoch, number + 1)
            self._window = Piece((epoch, number), np.sort((rows + offset) % self.n_rows), picks)
        return self._window

    def _epoch_blocks(self, epoch: int) -> tuple[int, Int64[np.ndarray, " blocks"]]:
        """Each epoch starts its blocks at another offset. Only full blocks are permuted: a short
        one stays last, so that windows start at fixed positions; the offset changes its rows."""
        if self._epoch is None or self._epoch[0] != epoch:
            full, rest = divmod(self.n_rows, self.block_rows)
            blocks = permutation(full, self.seed, epoch, 0)
            offset = int(_bits(1, self.seed, epoch, 0)[0] % np.uint64(self.n_rows))
            self._epoch = (epoch, offset, np.append(blocks, full) if rest else blocks)
        return self._epoch[1], self._epoch[2]


def _bits(n: int, *key: int) -> np.ndarray:
    return np.random.Philox(np.random.SeedSequence(key)).random_raw(n)


def permutation(n: int, *key: int) -> Int64[np.ndarray, " n"]:
    """A random order of n things that follows from the key alone."""
    return np.argsort(_bits(n, *key), kind="stable")
