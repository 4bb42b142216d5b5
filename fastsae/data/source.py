"""What the trainer requires of its data, on disk or generated on the fly."""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float32, Int, Int64
from torch import Tensor

from fastsae.data.prefetch import Batches, Load, Loader, Window, checked
from fastsae.data.shuffle import Cursor, Shuffle


@runtime_checkable
class ActivationSource(Protocol):
    """Activations to train on: `ActivationShards`, `Stream`, or anything with these members."""

    @property
    def d_in(self) -> int:
        """Width of a row."""
        ...

    @property
    def n_tokens(self) -> int | None:
        """Rows in one epoch; None if it is unknown."""
        ...

    @property
    def fingerprint(self) -> str:
        """A short hash of the data; a cursor is only valid for data with the same hash."""
        ...

    @property
    def heldout(self) -> "StoredActivations | None":
        """Rows set aside for evaluation."""
        ...

    def where(self, row: int) -> str:
        """A readable name of a row for messages: its file, and its number in that file."""
        ...

    def sample(self, n: int, seed: int = 0) -> Float32[Tensor, "_ d_in"]:
        """`n` distinct rows, or all if there are fewer; the same for the same seed."""
        ...

    def batches(
        self, batch_size: int, seed: int = 0, cursor: Cursor | None = None, pin_memory: bool = False
    ) -> Batches:
        """Endless shuffled batches, loaded ahead by a thread. With the cursor of an earlier batch
        they continue exactly after it. A row with NaN or Inf is a ValueError that names it."""
        ...


@runtime_checkable
class StoredActivations(ActivationSource, Protocol):
    """Activations that can be read in any order."""

    @property
    def n_tokens(self) -> int:
        """Rows in one epoch."""
        ...

    def rows(self, indices: Int[Tensor, " N"]) -> Float32[Tensor, "N d_in"]:
        """The rows at `indices`, in that order; ValueError if one is out of range."""
        ...


class Contexts(NamedTuple):
    """Where rows come from: token, position in the window of text, and document."""

    token_ids: Int[Tensor, " N"]
    positions: Int[Tensor, " N"]
    documents: Int[Tensor, " N"]


@runtime_checkable
class TextActivations(StoredActivations, Protocol):
    """Activations that may know their model and their text."""

    @property
    def model(self) -> str | None:
        """Hugging Face hub id or directory of the model."""
        ...

    @property
    def hookpoint(self) -> str | None:
        """Where in the model they are from."""
        ...

    @property
    def harvest(self) -> dict[str, Any]:
        """The settings that they were produced with."""
        ...

    @property
    def has_contexts(self) -> bool:
        """Whether it is known where rows come from."""
        ...

    def contexts(self, indices: Int[Tensor, " N"]) -> Contexts:
        """Tokens, positions and documents of the rows at `indices`; ValueError if unknown."""
        ...


class Shuffled(ABC):
    """Base of the sources here: rows, samples and batches from `gather` and `shuffled`."""

    n_tokens: int

    @abstractmethod
    def gather(self, rows: Int64[np.ndarray, " N"]) -> Float32[np.ndarray, "N d_in"]:
        """The rows of these numbers, which are in range."""

    @abstractmethod
    def shuffled(self, seed: int) -> tuple[Shuffle, Load]:
        """The order of the rows, and the function that loads a window of them (see `Batches`)."""

    @abstractmethod
    def where(self, row: int) -> str:
        """See `ActivationSource`."""

    def rows(self, indices: Int[Tensor, " N"]) -> Float32[Tensor, "N d_in"]:
        """See `StoredActivations`."""
        return torch.from_numpy(self.gather(self.in_range(indices)))

    def in_range(self, indices: Int[Tensor, " N"]) -> Int64[np.ndarray, " N"]:
        """The row numbers in numpy; ValueError if one is out of range."""
        rows = indices.numpy().astype(np.int64, copy=False)
        if len(rows) and not 0 <= rows.min() <= rows.max() < self.n_tokens:
            raise ValueError(
                f"rows must be from 0 to {self.n_tokens - 1}, got {rows.min()} to {rows.max()}"
            )
        return rows

    def sample(self, n: int, seed: int = 0) -> Float32[Tensor, "_ d_in"]:
        """See `ActivationSource`."""
        generator = np.random.Generator(np.random.PCG64(seed))
        rows = generator.choice(self.n_tokens, min(n, self.n_tokens), replace=False)
        return torch.from_numpy(checked(self.gather(rows), rows, self.where))

    def batches(
        self,
        batch_size: int,
        seed: int = 0,
        cursor: Cursor | None = None,
        pin_memory: bool = False,
        part: tuple[int, int] = (0, 1),
    ) -> Batches:
        """See `ActivationSource`. With `part` = (r, n), only the values of part r of each batch, in
        n equal parts, are read; ValueError if it has no such parts."""
        order, load = self.shuffled(seed)
        if part[1] > 1:  # a window would be read by every process
            load = self.by_rows
        return Batches(Loader(order, load, self.where, batch_size, pin_memory, part), cursor)

    def by_rows(self, rows: Int64[np.ndarray, " window"]) -> Window:
        """A window of which nothing is loaded but what is picked."""
        return lambda picks: self.gather(rows[picks])
