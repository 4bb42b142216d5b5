"""Memory for the rows of a stream's buffer."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

PIECES, PIECE_BYTES = 32, 1 << 28
"""Pieces of memory that a full buffer takes; more if they were larger."""


class Chunk(NamedTuple):
    """Rows of the buffer."""

    rows: tuple[Float[Tensor, "N _"], ...]
    """At each hookpoint."""
    numbers: Int64[Tensor, " N"]


class Store:
    """Holds rows in pieces of memory of one size. New rows take the places of those that were
    drawn, which lie between others: their memory could not be returned."""

    def __init__(self, piece_rows: int):
        self.piece_rows = piece_rows
        self._pieces: list[Chunk] = []
        self._free = torch.empty(0, dtype=torch.int64)
        """Rising, so that few pieces hold the rows of a group."""

    @property
    def capacity(self) -> int:
        """Rows that it has memory for."""
        return len(self._pieces) * self.piece_rows

    def put(self, chunk: Chunk) -> Int64[Tensor, " N"]:
        """Copy rows to free places, which are returned."""
        n = len(chunk.numbers)
        while len(self._free) < n:
            self._grow(chunk)
        places, self._free = self._free[:n], self._free[n:]
        for piece, part, where in self._split(places):
            for whole, rows in zip(piece.rows, chunk.rows, strict=True):
                whole.index_copy_(0, where, rows[part].to(whole.dtype))
            piece.numbers[where] = chunk.numbers[part]
        return places

    def pick(self, places: Int64[Tensor, " N"]) -> Chunk:
        """A copy of the rows at some places, in that order. There must be at least one."""
        ordered, order = places.sort()
        first = self._pieces[0]
        found = Chunk(
            tuple(x.new_empty(len(places), x.shape[1]) for x in first.rows),
            torch.empty_like(places),
        )
        for piece, part, where in self._split(ordered):
            for out, whole in zip(found.rows, piece.rows, strict=True):
                out.index_copy_(0, order[part], whole.index_select(0, where))
            found.numbers[order[part]] = piece.numbers[where]
        return found

    def release(self, places: Int64[Tensor, " N"]) -> None:
        """Let other rows take these places."""
        self._free = torch.cat([self._free, places]).sort().values

    def _split(
        self, places: Int64[Tensor, " N"]
    ) -> Iterator[tuple[Chunk, slice, Int64[Tensor, " _"]]]:
        """The pieces that rising places are in, which of the places, and where in the piece."""
        starts = torch.arange(len(self._pieces) + 1) * self.piece_rows
        bounds = torch.searchsorted(places, starts).tolist()
        for number, piece in enumerate(self._pieces):
            part = slice(bounds[number], bounds[number + 1])
            if part.start < part.stop:
                yield piece, part, places[part] - number * self.piece_rows

    def _grow(self, like: Chunk) -> None:
        start = self.capacity
        rows = tuple(x.new_empty(self.piece_rows, x.shape[1]) for x in like.rows)
        self._pieces.append(Chunk(rows, torch.empty(self.piece_rows, dtype=torch.int64)))
        self.release(torch.arange(start, start + self.piece_rows))
