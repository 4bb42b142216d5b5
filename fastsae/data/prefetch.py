"""Batches loaded ahead of their use by one background thread."""

import queue
import threading
import weakref
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from fastsae.data.shuffle import Cursor, Shuffle

Window = Callable[[Int64[np.ndarray, " N"]], Float32[np.ndarray, "N d_in"]]
Load = Callable[[Int64[np.ndarray, " window"]], Window]


class Batch(NamedTuple):
    """Rows to train on, and the cursor from which the stream goes on after them."""

    x: Float32[Tensor, "N d_in"]
    cursor: Cursor
    rows: Int64[np.ndarray, " N"]
    """Which rows of the data they are."""


class Batches:
    """An endless iterator over shuffled batches that loads `depth` of them ahead.

    Every batch is a tensor of its own, never written to again, so it may be kept or changed.
    Epochs run into each other: all batches have `batch_size` rows and no row is left out. Close
    it, or use it in a `with` statement, to stop its thread.

    `load(rows)` fetches a window of rows, and returns a function that picks float32 rows out of it
    by their place in the window; it may reuse the memory of the window before. `where` names a row
    for people. Both run in the thread; what they raise is raised by `next`. A row with NaN or Inf
    is a ValueError that names the row.
    """

    def __init__(
        self,
        order: Shuffle,
        load: Load,
        where: Callable[[int], str],
        *,
        batch_size: int,
        cursor: Cursor | None = None,
        pin_memory: bool = False,
        depth: int = 2,
    ):
        if batch_size < 1 or depth < 1:
            raise ValueError(
                f"batch_size and depth must be at least 1, got {batch_size} and {depth}"
            )
        if pin_memory and not torch.cuda.is_available():
            raise ValueError("pin_memory=True needs a CUDA device, and there is none")
        start = cursor or Cursor()
        order.take(start, 1)  # a cursor that does not fit is the caller's error, raised here
        self._queue: queue.Queue[Batch | Exception] = queue.Queue(depth)
        self._error: Exception | None = None
        stop = threading.Event()
        loader = _Loader(order, load, where, batch_size, pin_memory)
        thread = threading.Thread(
            target=_run, args=(loader, start, self._queue, stop), name="batches", daemon=True
        )
        # The thread holds no reference to self: an iterator that is dropped unclosed closes too.
        self._finalizer = weakref.finalize(self, _shut, thread, self._queue, stop)
        thread.start()

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        if not self._finalizer.alive:
            raise self._error or ValueError("these batches are closed")
        item = self._queue.get()
        if isinstance(item, Exception):
            self._error = item
            self.close()
            raise item
        return item

    def close(self) -> None:
        """Stops the thread and waits for it to end. Closing twice is fine."""
        self._finalizer()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Loader:
    """Makes the batch that follows a cursor, keeping the window that it draws from."""

    def __init__(
        self,
        order: Shuffle,
        load: Load,
        where: Callable[[int], str],
        batch_size: int,
        pin_memory: bool,
    ):
        self.order, self.load, self.where = order, load, where
        self.batch_size, self.pin_memory = batch_size, pin_memory
        self._loaded: tuple[tuple[int, int], Window] | None = None

    def batch(self, cursor: Cursor) -> Batch:
        pieces, cursor = self.order.take(cursor, self.batch_size)
        parts: list[np.ndarray] = []
        for piece in pieces:
            if self._loaded is None or self._loaded[0] != piece.window:
                self._loaded = (piece.window, self.load(piece.rows))
            x = self._loaded[1](piece.picks)
            parts.append(checked(x, piece.rows[piece.picks], self.where))
        x = torch.from_numpy(parts[0] if len(parts) == 1 else np.concatenate(parts))
        rows = np.concatenate([piece.rows[piece.picks] for piece in pieces])
        return Batch(x.pin_memory() if self.pin_memory else x, cursor, rows)


def _run(
    loader: _Loader,
    cursor: Cursor,
    ready: "queue.Queue[Batch | Exception]",
    stop: threading.Event,
) -> None:
    while not stop.is_set():
        try:
            batch = loader.batch(cursor)
        except Exception as error:  # crosses to the consumer, which raises it
            ready.put(error)
            return
        cursor = batch.cursor
        ready.put(batch)


def _shut(thread: threading.Thread, ready: queue.Queue, stop: threading.Event) -> None:
    stop.set()
    while True:  # frees the place that the thread may be waiting for in `put`
        try:
            ready.get_nowait()
        except queue.Empty:
            break
    if thread is not threading.current_thread():  # the garbage collector may run in the thread
        thread.join()


def checked(
    x: Float32[np.ndarray, "N d_in"], rows: Int64[np.ndarray, " N"], where: Callable[[int], str]
) -> Float32[np.ndarray, "N d_in"]:
    """`x`, the values of `rows`, if they are finite; a ValueError names the first that is not."""
    finite = np.isfinite(x)
    if not finite.all():
        bad = int(rows[~finite.all(axis=1)].min())
        raise ValueError(f"data holds NaN or Inf: {where(bad)}")
    return x
