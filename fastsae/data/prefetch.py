"""Batches loaded ahead by a background thread."""

import queue
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from fastsae.data.shuffle import Cursor, Shuffle

Window = Callable[[Int64[np.ndarray, " N"]], Float32[np.ndarray, "N d_in"]]
Load = Callable[[Int64[np.ndarray, " window"]], Window]


def not_loaded(picks: Int64[np.ndarray, " N"]) -> Float32[np.ndarray, "N d_in"]:
    """The window before one is loaded."""
    raise AssertionError("no window is loaded")


AHEAD = 2  # batches that wait for the consumer
POLL_SECONDS = 0.2
LAST_SECONDS = 60.0
"""How long a thread may take to end; one that waits for a process that is lost never does."""


class Batch(NamedTuple):
    """Rows to train on, and the cursor from which the stream continues after them."""

    x: Float32[Tensor, "N d_in"]
    cursor: Cursor
    rows: Int64[np.ndarray, " N"]
    """Row numbers in the data, also of those that other processes read."""
    kept: Bool[Tensor, " N"] | None = None
    """In training: which rows are as drawn; others replace those of extreme norm."""


@runtime_checkable
class BatchLoader(Protocol):
    """Builds the batch at a cursor. They are asked for in order, from some cursor on."""

    batch_size: int
    pin_memory: bool

    def check(self, cursor: Cursor) -> None:
        """ValueError if the cursor does not fit."""
        ...

    def batch(self, cursor: Cursor, stopped: Callable[[], bool]) -> Batch:
        """It may take long, but raises an exception soon after `stopped` is true."""
        ...

    @property
    def close(self) -> Callable[[], None]:
        """What is called at last, in the same thread, unless a batch failed."""
        ...


@dataclass
class Loader:
    """Builds batches of rows that can be read at random, keeping the current window loaded."""

    order: Shuffle
    load: Load
    """Loads a window of rows and returns a function that picks float32 rows by their position in
    it; it may reuse the memory of the previous window."""

    where: Callable[[int], str]
    """A row's name for messages."""

    batch_size: int
    pin_memory: bool = False
    part: tuple[int, int] = (0, 1)
    """Which of how many equal parts of a batch are read."""
    window: tuple[int, int] | None = field(default=None, init=False)
    pick: Window = field(default=not_loaded, init=False)

    def __post_init__(self):
        number, parts = self.part
        if self.batch_size % parts or not 0 <= number < parts:
            raise ValueError(f"batch_size = {self.batch_size} has no part {number} of {parts}")

    def check(self, cursor: Cursor) -> None:
        self.order.take(cursor, 1)

    def close(self) -> None:
        pass

    def batch(self, cursor: Cursor, stopped: Callable[[], bool]) -> Batch:
        pieces, cursor = self.order.take(cursor, self.batch_size)
        size = self.batch_size // self.part[1]
        first, done = self.part[0] * size, 0
        parts: list[np.ndarray] = []
        for piece in pieces:
            picks = piece.picks[max(first - done, 0) : max(first + size - done, 0)]
            done += len(piece.picks)
            if not len(picks):
                continue
            if self.window != piece.window:
                self.pick = not_loaded  # frees the last window before the next one is loaded
                self.window, self.pick = piece.window, self.load(piece.rows)
            parts.append(checked(self.pick(picks), piece.rows[picks], self.where))
        x = torch.from_numpy(parts[0] if len(parts) == 1 else np.concatenate(parts))
        rows = np.concatenate([piece.rows[piece.picks] for piece in pieces])
        return Batch(x.pin_memory() if self.pin_memory else x, cursor, rows)


class Batches:
    """An endless iterator over shuffled batches that loads a few of them ahead in a thread.

    Every batch is a new tensor that is never written to again, so it may be kept or changed.
    Epochs follow each other without a gap: all batches have `batch_size` rows, and no row is left
    out. Close it, or use it in a `with` statement, to stop its thread. An exception in the thread
    is raised by `next`; a row with NaN or Inf is a ValueError that names the row.
    """

    def __init__(self, loader: BatchLoader, cursor: Cursor | None = None):
        if loader.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {loader.batch_size}")
        if loader.pin_memory and not torch.cuda.is_available():
            raise ValueError("pin_memory=True needs a CUDA device, and there is none")
        start = cursor or Cursor()
        loader.check(start)
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(AHEAD)
        self._error: BaseException | None = None
        stop = threading.Event()
        # A new thread's GPU is the first one, whichever is current here.
        gpu = torch.cuda.current_device() if loader.pin_memory else None
        arguments = loader, start, self._queue, stop, gpu
        thread = threading.Thread(target=_run, args=arguments, name="batches", daemon=True)
        # The thread holds no reference to self: an iterator that is dropped unclosed closes too.
        self._finalizer = weakref.finalize(self, _shut, thread, self._queue, stop)
        thread.start()

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        batch = self.take(lambda: False)
        assert batch is not None
        return batch

    def take(self, interrupted: Callable[[], object]) -> Batch | None:
        """The next batch; None if `interrupted` becomes true while it is waited for."""
        if not self._finalizer.alive:
            raise self._error or ValueError("these batches are closed")
        while True:
            try:
                item = self._queue.get(timeout=POLL_SECONDS)
                break
            except queue.Empty:
                if interrupted():
                    return None
        if isinstance(item, BaseException):
            self._error = item
            self.close()
            raise item
        return item

    def close(self) -> None:
        """Stops the thread and waits for it to end. May be called twice."""
        self._finalizer()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _run(
    loader: BatchLoader,
    cursor: Cursor,
    ready: "queue.Queue[Batch | BaseException]",
    stop: threading.Event,
    gpu: int | None,
) -> None:
    if gpu is not None:
        torch.cuda.set_device(gpu)
    while not stop.is_set():
        try:
            batch = loader.batch(cursor, stop.is_set)
        except BaseException as error:  # the consumer, who would wait forever, raises it
            ready.put(error)
            return
        cursor = batch.cursor
        ready.put(batch)
    with suppress(RuntimeError):  # of processes that are gone, of which the training step tells
        loader.close()


def _shut(thread: threading.Thread, ready: queue.Queue, stop: threading.Event) -> None:
    stop.set()
    while True:  # unblocks a thread that is waiting in `put`
        try:
            ready.get_nowait()
        except queue.Empty:
            break
    if thread is not threading.current_thread():  # garbage collection may run in it
        thread.join(LAST_SECONDS)


def checked(
    x: Float32[np.ndarray, "N d_in"], rows: Int64[np.ndarray, " N"], where: Callable[[int], str]
) -> Float32[np.ndarray, "N d_in"]:
    """`x`, the values of `rows`, if all are finite; ValueError naming the first row that is not."""
    finite = np.isfinite(x)
    if not finite.all():
        bad = int(rows[~finite.all(axis=1)].min())
        raise ValueError(f"data holds NaN or Inf: {where(bad)}")
    return x
