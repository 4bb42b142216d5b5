"""One clock for CPUs and GPUs: time per call, rounds in turns, and peak memory."""

import gc
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SPACER = 2_000_000
"""Cycles that a GPU sleeps before a call, about a millisecond: until then it has been launched."""

ROTATED = 1 << 30
"""Bytes of inputs to take turns among, several times any L2 cache."""


def digits(x: float) -> float:
    """x to four significant digits."""
    return float(f"{x:.4g}")


def summary(times: list[float], digits: int = 2) -> dict[str, float]:
    return {
        "median": round(statistics.median(times), digits),
        "min": round(min(times), digits),
        "max": round(max(times), digits),
    }


class Stopwatch:
    """Time on the device between construction and `stop`, known after `synchronize`."""

    def __init__(self, device: torch.device):
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


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(
    run: Callable[..., object],
    sets: list[tuple],
    device: torch.device,
    count: int,
    space: bool = True,
) -> list[Stopwatch]:
    """A stopwatch of each of count calls; with `space`, launched ahead of the GPU."""
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
    run: Callable[..., object],
    sets: list[tuple],
    device: torch.device,
    budget: float = 200.0,
    *,
    space: bool = True,
    dry: bool = False,
) -> dict[str, Any]:
    """Milliseconds per call, over as many calls as fit a budget of ms; one where it is a dry run.

    `ms` is time on the device: median, min and max; `host ms` the median that a launch took.
    """
    watches = timed(run, sets, device, 1 if dry else 2, False)
    if not dry:
        once = timed(run, sets, device, 1, space)[0].ms()
        most = 50 if space else 2000  # back to back, a burst may last as long as it is asked to
        count = min(most, max(5 if once < 200 else 3, round(budget / once)))
        watches = timed(run, sets, device, count, space)
    host = statistics.median(watch.seconds for watch in watches) * 1e3
    return {"ms": summary([watch.ms() for watch in watches], 4), "host ms": round(host, 4)}


def interleaved(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds per call of each run, in turns of half a second, after one uncounted turn.

    Taking turns spreads a change in the machine's speed over all of them; short runs are called
    several times in theirs, as a training loop calls them.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    calls = dict.fromkeys(runs, 1)
    cpu = torch.device("cpu")
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
    """Of all tensors among arguments and the tuples in them."""
    total = 0
    for a in arguments:
        if isinstance(a, Tensor):
            total += a.nbytes
        elif isinstance(a, (tuple, list)):
            total += nbytes(a)
    return total


def input_sets(make: Callable[[], tuple], most: int = 64) -> list[tuple]:
    """As many sets of inputs as it takes for none to be in the cache when its turn comes."""
    sets = [make()]
    wanted = min(most, -(-ROTATED // max(nbytes(sets[0]), 1)))
    return sets + [make() for _ in range(wanted - 1)]


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        with suppress(RuntimeError):  # of a context that is lost: record.py finds that
            torch.cuda.empty_cache()


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """The most memory that run holds beyond what was held before; None where that is unknown."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux sets the peak back to the present
    except OSError:
        return None
    before = resident_bytes("VmRSS")
    run()
    return max(0, resident_bytes("VmHWM") - before)


def resident_bytes(which: str = "VmHWM") -> int:
    """Resident size of this process: its peak so far (VmHWM), or now (VmRSS)."""
    status = Path("/proc/self/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith(which)]
    return int(line.split()[1]) << 10
