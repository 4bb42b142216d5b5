"""Rows from whatever yields them: a DataLoader, a dataset, a generator, or a function."""

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from fastsae.data.arrays import ActivationArray, check_rows, is_float
from fastsae.data.producer import Group, Part, Place
from fastsae.files import shown

GROUP_ROWS = 1024
"""Smaller batches are joined up to this."""


class IterableProducer:
    """Takes the rows of a `Stream` from an iterable of batches, or from a function without
    arguments that returns one, such as a generator function.

    A batch is a float tensor, array or list [n, d_in], or a single row [d_in]; or a tuple, list or
    dictionary in which one entry is such a matrix (or, without a matrix, such a row). When the
    batches come to an end, they begin again. A run resumes by reading them from the first one, so
    the iterable or the function must give the same batches every time. Two do not:

    - A generator runs only once. A second start, at its end or on resume, is a ValueError; pass
      the function that returns it.
    - A `DataLoader` in random order cannot resume bit-for-bit. It is known by its width alone, and
      no rows of it are held out: the next epoch would train on them.

    Args:
        batches: the iterable, or the function.
        heldout_tokens: the first batches, until they have this many rows, are set aside for
            evaluation; of batches whose number is known, at most 5 %. 0 sets none aside.
        name: of the hookpoint.
        fingerprint: by default a short hash of the first batch.

    Raises ValueError if there is no batch, or one is something else.
    """

    def __init__(
        self,
        batches: Iterable[Any] | Callable[[], Iterable[Any]],
        heldout_tokens: int = 4096,
        *,
        name: str = "activations",
        fingerprint: str | None = None,
    ):
        self._batches = batches
        if isinstance(batches, Iterator) and heldout_tokens < 1:
            raise ValueError(
                "a generator runs only once, so the rows to evaluate on must be its first: "
                f"heldout_tokens must be at least 1, got {heldout_tokens}"
            )
        at_random = isinstance(batches, DataLoader) and isinstance(batches.sampler, RandomSampler)
        most = 0 if at_random or not heldout_tokens else _number_of(batches) // 20
        iterator, seen, size = self._open(), list[Tensor](), 0
        for batch in iterator:
            seen.append(rows_of(batch, len(seen)).clone())  # a generator may reuse its memory
            size += len(seen[-1])
            if size >= heldout_tokens or len(seen) >= most:
                break
        else:  # few enough to keep them all
            self._batches, most = seen, min(most, len(seen) // 20)
        if not size:
            raise ValueError("there are no activations: no batch has a row")
        self._heldout = seen[:most]
        self._opened: Iterator[Any] | None = chain(seen[most:], iterator)
        first = next(x for x in seen if len(x))
        self.widths = {name: first.shape[1]}
        known = f"random-{first.shape[1]}" if at_random else ActivationArray(first).fingerprint
        self.fingerprint = fingerprint or f"{known}-{len(self._heldout)}"

    def groups(self, start: Place = (), part: Part = "train") -> Iterator[Group]:
        """See `Producer`. A place is the number of batches before it."""
        (first,) = start or (0,)
        if part != "train":
            for number, rows in islice(enumerate(self._heldout), first, None):
                rows = self._checked(rows, number)
                yield Group((rows,), None, (number + 1,), heldout=True, finite=True)
        if part == "heldout":
            return
        first = max(first, len(self._heldout))
        joined, size = list[Tensor](), 0
        for number, batch in enumerate(self._from(first), first):
            joined.append(self._checked(rows_of(batch, number), number).clone())
            size += len(joined[-1])
            if size >= GROUP_ROWS:
                yield Group((torch.cat(joined),), None, (number + 1,), finite=True)
                joined, size, first = [], 0, number + 1
        if size:
            yield Group((torch.cat(joined),), None, (first + len(joined),), finite=True)

    def _checked(self, rows: Float[Tensor, "N D"], number: int) -> Float[Tensor, "N D"]:
        (width,) = self.widths.values()
        if rows.shape[1] != width:
            raise ValueError(f"batch {number} has width {rows.shape[1]}, earlier ones have {width}")
        finite = rows.isfinite().all(1)
        if not finite.all():
            raise ValueError(
                f"batch {number} holds NaN or Inf in row {int(finite.byte().argmin())}"
            )
        return rows

    def _from(self, number: int) -> Iterator[Any]:
        """The batches from a number on: those that the look at the first ones has left, if they
        are still there."""
        opened, self._opened = self._opened, None
        if opened is not None:
            return islice(opened, number - len(self._heldout), None)
        if isinstance(self._batches, Iterator):
            raise ValueError(
                "a generator runs only once and has been started already: pass a function that "
                "returns one, to begin again at its end or to resume a run"
            )
        return islice(self._open(), number, None)

    def _open(self) -> Iterator[Any]:
        batches = self._batches
        if callable(batches):
            _check_no_arguments(batches)
        found = batches() if callable(batches) else batches
        if not isinstance(found, Iterable):
            kind = type(found).__name__
            raise ValueError(f"the function must return an iterable of batches, got {kind}")
        return iter(found)


def _number_of(batches: object) -> int:
    try:
        return len(batches) if isinstance(batches, Sized) else sys.maxsize
    except TypeError:  # a DataLoader over a dataset without a length
        return sys.maxsize


def _check_no_arguments(function: Callable) -> None:
    """ValueError if a function needs arguments."""
    try:
        signature = inspect.signature(function, follow_wrapped=False)
    except (TypeError, ValueError):  # of a function that Python cannot look into
        return
    try:
        signature.bind()
    except TypeError as error:
        raise ValueError(f"the function must work without arguments: {error}") from None


def rows_of(batch: Any, number: int) -> Float[Tensor, "N D"]:
    """The rows in a batch; ValueError if it is not clear which they are."""
    parts = _array(batch)
    if isinstance(parts, Mapping):
        parts = [*parts.values()]
    parts = [*map(_array, parts)] if isinstance(parts, list | tuple) else [parts]
    arrays = [x for x in parts if isinstance(x, Tensor | np.ndarray) and is_float(x)]
    for found in ([x for x in arrays if x.ndim == n] for n in (2, 1)):
        if len(found) == 1:
            rows = found[0]
            if isinstance(rows, np.ndarray):  # torch takes neither other byte orders nor constants
                rows = torch.from_numpy(np.require(rows, rows.dtype.newbyteorder("="), "W"))
            return torch.atleast_2d(rows.detach())
        if found:
            break
    if len(arrays) == 1:
        check_rows(arrays[0])
    if len(lengths := _row_lengths([batch, *parts])) > 1:
        raise ValueError(f"batch {number} must have rows of one length, got {shown(lengths)}")
    kinds = [f"{x.dtype} {[*x.shape]}" for x in parts if isinstance(x, Tensor | np.ndarray)]
    found = ", ".join(kinds[:4]) + f" and {len(kinds) - 4} more" * (len(kinds) > 4)
    raise ValueError(
        f"batch {number} must hold one matrix of floats [n, d_in], "
        f"got {type(batch).__name__} of {found or 'no arrays'}"
    )


def _row_lengths(values: Sequence[Any]) -> list[int]:
    """The lengths of the float vectors in lists, such as datasets return where the rows of a column
    differ in length."""
    lists = [x for x in values if isinstance(x, list) or getattr(x, "dtype", 0) == np.object_]
    vectors = (x for x in chain(*lists) if isinstance(x, Tensor | np.ndarray) and is_float(x))
    return sorted({len(x) for x in vectors if x.ndim == 1})


def _array(value: Any) -> Any:
    """Nested lists of floats as an array; anything else as it is."""
    leaf = value
    while isinstance(leaf, list | tuple) and leaf:
        leaf = leaf[0]
    if not isinstance(leaf, float) or leaf is value:
        return value
    try:
        return np.asarray(value, np.float32)
    except ValueError:
        raise ValueError(
            "rows that are lists of floats must have one length, and none may be missing"
        ) from None
