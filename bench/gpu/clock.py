"""What every measurement on a GPU shares: a clock, memory, ceilings, and failures that are results.

On a CPU, for a rehearsal, the same functions run and their numbers mean nothing.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.common import summary

from .data import Problem

SPACER = 2_000_000
"""Cycles that a GPU sleeps before a call, about a millisecond: until then it has been launched."""

NO_ROOM = "does not fit"

ROTATED = 1 << 30
"""Bytes of inputs to take turns among, several times any L2 cache."""


def digits(x: float) -> float:
    """x to four digits that count."""
    return float(f"{x:.4g}")


def shown(x: float | None, form: str) -> str:
    return "-".rjust(int(form.split(".")[0])) if x is None else format(x, form)


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        with suppress(RuntimeError):  # of a context that is lost: record.py finds that
            torch.cuda.empty_cache()


def attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What work returns, or what went wrong, with its memory freed."""
    try:
        return work()
    except torch.OutOfMemoryError:
        error = NO_ROOM
    except Exception as problem:  # it goes into the record; the other rows are worth having
        lines = str(problem).strip().splitlines() or [""]
        error = f"{type(problem).__name__}: {lines[0][:300]}"
    free()
    return {"error": error}


def nbytes(arguments: Iterable[Any]) -> int:
    """Of all tensors among arguments and the tuples in them."""
    total = 0
    for a in arguments:
        if isinstance(a, Tensor):
            total += a.nbytes
        elif isinstance(a, (tuple, list)):
            total += nbytes(a)
    return total


def input_sets(make: Callable[[Problem], tuple], p: Problem) -> list[tuple]:
    """As many sets of inputs as it takes for none to be in the L2 cache when its turn comes."""
    sets = [make(p)]
    most = 2 if p.rehearsal else 64
    wanted = min(most, -(-ROTATED // max(nbytes(sets[0]), 1)))
    return sets + [make(p) for _ in range(wanted - 1)]


class Stopwatch:
    """Time on the device between construction and `stop`, known after `torch.cuda.synchronize`."""

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
        torch.cuda.synchronize()


def timed(
    run: Callable[..., object], sets: list[tuple], p: Problem, count: int, space: bool
) -> list[Stopwatch]:
    """A stopwatch of each of count calls, launched ahead of the GPU."""
    watches = []
    for n in range(count):
        if space and p.device.type == "cuda":
            torch.cuda._sleep(SPACER)  # pyright: ignore[reportPrivateUsage]
        watch = Stopwatch(p.device)
        run(*sets[n % len(sets)])
        watch.stop()
        watches.append(watch)
    synchronize(p.device)
    return watches


def measure(
    run: Callable[..., object], sets: list[tuple], p: Problem, budget: float = 200.0
) -> dict[str, Any]:
    """Milliseconds per call, of as many calls as a budget allows."""
    if p.rehearsal:
        return times(timed(run, sets, p, 1, False))
    timed(run, sets, p, 2, False)
    once = timed(run, sets, p, 1, True)[0].ms()
    count = min(50, max(5 if once < 200 else 3, round(budget / once)))
    return times(timed(run, sets, p, count, True))


def times(watches: list[Stopwatch]) -> dict[str, Any]:
    """Median, least and most milliseconds on the device, and the median that a launch took."""
    host = statistics.median(watch.seconds for watch in watches) * 1e3
    return {
        "ms": summary([watch.ms() for watch in watches], digits=4),
        "host ms": round(host, 4),
    }


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most memory that run holds beyond what was held before; on a CPU, 0 without a run."""
    if device.type == "cpu":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


class Cost(NamedTuple):
    """The least that an op has to do."""

    bytes: float
    """Inputs read once, outputs written once."""
    flops: float = 0.0
    rate: str = "fp32"
    """Which of the measured rates serves its FLOPs."""
    gathered: float = 0.0
    """Bytes that it reads in rows picked by indices, each as often as it is picked."""


class Floors(NamedTuple):
    """What this machine reached in this run."""

    bandwidth: float
    """Bytes per second of a copy, read and written."""
    rates: dict[str, float]
    """FLOP/s of products of 8192 by 8192 matrices, by kind."""
    encoders: dict[str, float]
    """Milliseconds of the encoder's product in bf16, by shape."""

    def ms(self, cost: Cost) -> float:
        return 1e3 * max(cost.bytes / self.bandwidth, cost.flops / self.rates[cost.rate])


PRODUCTS = {
    "bf16": (torch.bfloat16, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "fp32": (torch.float32, "ieee"),
}
"""Dtype and precision."""


def product_row(p: Problem, kind: str) -> dict[str, Any]:
    """cuBLAS's product of the encoder, without bias, all tokens at once."""
    dtype, precision = PRODUCTS[kind]
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        sets = [(p.normal(p.N, p.D, dtype=dtype), p.normal(p.F, p.D, dtype=dtype))]
        out = torch.empty(p.N, p.F, dtype=dtype, device=p.device)
        row = measure(lambda x, W: torch.mm(x, W.t(), out=out), sets, p, budget=100)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    return row | {"TFLOP/s": digits(2 * p.N * p.D * p.F / row["ms"]["median"] / 1e9)}


def copy_row(device: torch.device) -> dict[str, Any]:
    """A copy of 4 GB within the device."""
    size = 1 << (20 if device.type == "cpu" else 30)
    p = Problem("copy", 1, 1, 1, 1, device)
    source = p.normal(size)
    target = torch.empty_like(source)
    row = measure(lambda: target.copy_(source), [()], p)
    return row | {"GB/s": digits(2 * source.nbytes / row["ms"]["median"] / 1e6)}


def floors_from(rows: dict[str, dict[str, Any]]) -> Floors:
    """What is missing is NaN."""
    nan = {"GB/s": math.nan, "TFLOP/s": math.nan}
    rates = {kind: (nan | rows.get(f"{kind} square", {}))["TFLOP/s"] * 1e12 for kind in PRODUCTS}
    encoders = {
        key.removeprefix("bf16 "): row["ms"]["median"]
        for key, row in rows.items()
        if key.startswith("bf16 ") and "ms" in row
    }
    return Floors((nan | rows.get("copy", {}))["GB/s"] * 1e9, rates, encoders)
