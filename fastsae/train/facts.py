"""What a run needed, next to what was planned."""

import threading
from typing import TYPE_CHECKING, TypedDict

import torch

from fastsae.memory import anonymous_memory

from .state import TrainState

if TYPE_CHECKING:
    from .trainer import Trainer

SAMPLED_SECONDS = 0.05
"""Between two readings of the memory of a process."""


class Facts(TypedDict, total=False):
    """Part of summary.json: what was planned, and what it took. What is not known is left out."""

    planned_step_seconds: float
    """Of a training step, with the time to wait for its data."""
    step_seconds: float
    planned_peak_bytes: int
    """Most memory on the GPU, or of the process on a CPU without the pages of files, beyond what
    it had before the run."""
    peak_bytes: int
    """The same as measured by `MemoryMeter`: on a CPU, the largest of its readings."""


class MemoryMeter:
    """The most memory that is used from its construction on.

    On a GPU it is the peak that torch counts. On a CPU it is the largest reading of the anonymous
    memory of the process (RssAnon). In a `with` statement, a thread reads it every 50 ms; `note`
    adds a reading before freed memory is released. What is freed within 50 ms is missed, unless the
    allocator keeps it until the next reading, as glibc does with blocks of up to 1 GB, or of 32 MB
    in older releases.
    """

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        else:
            self.before = anonymous_memory()
        self.most = self.before or 0
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "MemoryMeter":
        if self.device.type != "cuda" and self.before is not None:
            self._thread = threading.Thread(target=self._sample, name="memory", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLED_SECONDS):
            self.note()

    def note(self) -> None:
        """Take note of the memory that is used now, or on a GPU was used at most so far."""
        with self._lock:
            if self.device.type == "cuda":
                self.most = torch.cuda.max_memory_allocated(self.device)
            else:
                self.most = max(self.most, anonymous_memory() or 0)

    def read(self) -> int | None:
        """Bytes beyond those at its construction; None where it cannot be known."""
        self.note()
        return None if self.before is None else self.most - self.before


def facts_of(trainer: "Trainer", state: TrainState, meter: MemoryMeter) -> Facts:
    """What was planned of a run, and what it took."""
    found = trainer.forecast
    facts: Facts = {
        "planned_peak_bytes": found.memory.peak,
        "step_seconds": state.seconds / max(state.step, 1),
    }
    if found.step_seconds is not None and not found.workload.streamed:
        facts["planned_step_seconds"] = found.step_seconds
    if (peak := meter.read()) is not None:
        facts["peak_bytes"] = peak
    return facts
