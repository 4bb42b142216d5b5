"""Timing on CPUs and GPUs: time per call, interleaved rounds, and peak memory."""

import gc
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import device as Device

SPACER = 2_000_000
"""Cycles that a GPU sleeps before a timed call, about 1 ms: the call is queued by then, so that the
time of its launch does not count."""

ROTATION_BYTES = 1 << 30
"""Size of the input sets that successive calls rotate through: several times any L2 cache."""


def significant(x: float) -> float:
    """x rounded to four significant digits."""
    return float(f"{x:.4g}")


def summary(times: list[float], digits: int = 2) -> dict[str, float]:
    """Median, minimum and maximum."""
    found = {"median": statistics.median(times), "min": min(times), "max": max(times)}
    return {name: round(ms, digits) for name, ms in found.items()}


class Stopwatch:
    """Device time between construction and `stop`; can be read after `synchronize`."""

    def __init__(self, device: Device):
        self.events = None
        if device.type == "cuda":
            self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self.events[0].record()
        self.start = time.perf_counter()
        self.seconds = 0.0

    def stop(self) -> None:
        if self.events is not None:
            self.events[1].record()
        self.seconds = time.perf_counter() - self.start

    def ms(self) -> float:
        if self.events is not None:
            return self.events[0].elapsed_time(self.events[1])
        return self.seconds * 1e3


def synchronize(device: Device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


Run = Callable[..., object]
Sets = list[tuple]
"""Arguments of a run: successive calls rotate through them."""


def timed(run: Run, sets: Sets, device: Device, count: int, space: bool = True) -> list[Stopwatch]:
    """One stopwatch per call. With `space`, the GPU sleeps before each, to hide launch times."""
    watches = []
    for n in range(count):
        if space and device.type == "cuda":
            torch.cuda._sleep(SPACER)  # pyright: ignore[reportPrivateUsage]
        watch = Stopwatch(device)
        run(*sets[n % len(sets)])
        watch.stop()
        watches.append(watch)
    synchronize(device)
    return watches


def measure(
    run: Run, sets: Sets, device: Device, budget: float = 200.0, *, space: bool = True, dry=False
) -> dict[str, Any]:
    """Time as many calls as fit into a budget of milliseconds, or just one in a dry run.

    `ms` is the device time per call (median, min, max), `host ms` the median launch time.
    """
    watches = timed(run, sets, device, 1 if dry else 2, False)
    if not dry:
        once = timed(run, sets, device, 1, space)[0].ms()
        most = 50 if space else 2000  # back-to-back calls may use the whole budget
        count = min(most, max(5 if once < 200 else 3, round(budget / once)))
        watches = timed(run, sets, device, count, space)
    host = statistics.median(watch.seconds for watch in watches) * 1e3
    return {"ms": summary([watch.ms() for watch in watches], 4), "host ms": round(host, 4)}


def interleaved(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds per call of each run, in interleaved rounds after one warm-up round.

    Interleaving spreads changes of the machine's speed over all runs. A turn takes about half a
    second: short runs are called repeatedly, as a training loop calls them.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    calls = dict.fromkeys(runs, 1)
    cpu = Device("cpu")
    for counted in [False] + [True] * rounds:
        for name, run in runs.items():
            took = sum(watch.ms() for watch in timed(run, [()], cpu, calls[name])) / calls[name]
            if counted:
                times[name].append(took)
            else:
                calls[name] = max(1, round(500 / took))
    return times


# --- inputs and memory ----------------------------------------------------------------------


def nbytes(arguments: Iterable[Any]) -> int:
    """Total size of all tensors among the arguments, also of those inside tuples."""
    return sum(
        a.nbytes if isinstance(a, Tensor) else nbytes(a) if isinstance(a, tuple) else 0
        for a in arguments
    )


def input_sets(make: Callable[[], tuple], most: int = 64) -> list[tuple]:
    """Enough sets of inputs that none is still in the cache when its turn comes again."""
    sets = [make()]
    wanted = min(most, -(-ROTATION_BYTES // max(nbytes(sets[0]), 1)))
    return sets + [make() for _ in range(wanted - 1)]


def free() -> None:
    """Return unused memory to the device."""
    gc.collect()
    if torch.cuda.is_available():
        with suppress(RuntimeError):  # if the CUDA context is lost, record.py handles it
            torch.cuda.empty_cache()


def peak_bytes(run: Callable[[], object], device: Device) -> int | None:
    """Peak memory of a run, beyond what was allocated before; None where it is unknown."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets Linux's peak to the current size
    except OSError:
        return None
    before = resident_bytes("VmRSS")
    run()
    return max(0, resident_bytes("VmHWM") - before)


def resident_bytes(which: str = "VmHWM") -> int:
    """Resident size of this process: its peak so far (VmHWM), or now (VmRSS)."""
    return int(Path("/proc/self/status").read_text().partition(f"{which}:")[2].split()[0]) << 10
