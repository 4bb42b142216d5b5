"""Predicts the fused TopK step on a GPU, kernel by kernel, from bytes and FLOPs.

A kernel takes the longest of its bytes of device memory at the rate of a copy, and all its bytes at
the rate of the L2. These are predictions, not measurements: of an H200, the speed of a copy and of
a bf16 GEMM were measured; all other rates are assumptions.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from fastsae.distributed import Axes

from .exchange import Size

CACHED = 30e6
"""Assumed bytes of rows that the L2 keeps."""

SMALL = 40 * 3e-6
"""Assumed seconds of the step's small launches: sorting, biases, sums."""


class Rates(NamedTuple):
    """What a GPU reaches, per second."""

    memory: float
    """Bytes of a copy, read and written."""
    l2: float
    """Bytes from the L2."""
    bf16: float
    """FLOPs of a GEMM."""
    fp8: float
    """FLOPs of a GEMM in fp8; 0 without it."""


H200 = Rates(memory=4.3e12, l2=6.5e12, bf16=780e12, fp8=1300e12)
"""Memory and bf16 as measured, L2 and fp8 assumed."""


class Work(NamedTuple):
    """What one kernel does in a step."""

    kernel: str
    memory: float
    """Bytes of device memory that it reads and writes."""
    cached: float
    """Bytes that it reads of rows that are in the L2 by then."""
    trips: float
    """Round trips to memory, of all programs together."""

    def seconds(self, rates: Rates, waiting: float = 0.0) -> float:
        """`waiting` is the time of the round trips that few resident programs make in turn."""
        moved = self.memory / rates.memory, (self.memory + self.cached) / rates.l2
        return max(*moved, waiting)


class Update(NamedTuple):
    """How Adam updates the weights; by default as cheaply as it can."""

    moment_bytes: float = 4
    """Bytes of both moments of a weight: 8 in fp32, 4 in bf16."""
    window: int = 8
    """Steps that a row without gradient waits at most."""


def busy_latents(N: int, F: int, K: int) -> float:
    """Latents that fire on some of N tokens where frequencies fall as 1 / rank."""
    members = max(F // K, 1)
    rank = torch.arange(1, members + 1, dtype=torch.float64)
    share = (1 + 1 / rank).log() / math.log(members + 1)
    return K * float((1 - (1 - share) ** N).sum())


def cached_share(D: int, F: int, K: int) -> float:
    """Share of the picked rows that are among the most frequent ones, which stay in the L2."""
    rank = min(CACHED / (2 * D * K), F // K)
    return math.log(rank + 1) / math.log(F // K + 1)


def step_work(
    N: int, D: int, F: int, K: int, fp8: bool, update: Update | None = None
) -> Iterator[Work]:
    """The step in bf16, but for the encoder GEMM and SMALL."""
    moment_bytes, window = update or Update()
    busy, share = busy_latents(N, F, K), cached_share(D, F, K)
    visited = busy + (F - busy) / window
    picked = 2 * N * K * D  # bytes of bf16 rows, as often as they are picked
    yield Work("_center_kernel", 6 * N * D, 0, N)
    yield Work("_topk_kernel", 2 * N * F, 0, 3 * N)
    if fp8:
        yield Work("_quantize_kernel", 3 * N * D, 0, N)
        yield Work("_rescore_kernel", 2 * picked * (1 - share), 2 * picked * share, 6 * N)
    rows = max(picked * (1 - share), 2 * busy * D)
    yield Work("_squared_error_kernel", rows + 6 * N * D, picked - rows, 3 * N)
    # Per weight: itself and both moments, read and written, and the copies, written.
    state = (8 + 2 * moment_bytes + 2 + fp8 / 2) * visited * D
    together = 8 if D <= 2048 else 4  # rows of x or of the error that a program waits for
    gathers = visited * (2 + N * K / busy / together)
    yield Work("_adam_kernel", 2 * (state + 2 * N * D), 2 * picked, 2 * gathers)


PARTS = {
    "_topk_kernel": "top-k",
    "_squared_error_kernel": "decode",
    "_adam_kernel": "optimizer",
    "_rescore_kernel": "rescore",
}
"""Names of what kernels do; others are small."""


def kernel_seconds(
    size: Size, axes: Axes, fp8: bool, rates: Rates = H200, update: Update | None = None
) -> dict[str, float]:
    """Time of the kernels of a GPU of a mesh in a step, however few of its CTAs run at a time."""
    (N, d, F, k), L = size, axes.latent
    M, rows, few = N // axes.data, F // L, max(k // L, 1)
    parts = {"encoder GEMM": 2 * M * rows * d / (rates.fp8 if fp8 else rates.bf16), "other": SMALL}

    def add(kernel: str, tokens: int, K: int, times: int = 1) -> None:
        work = {one.kernel: one for one in step_work(tokens, d, rows, K, fp8, update)}[kernel]
        part = PARTS.get(kernel, "other")
        parts[part] = parts.get(part, 0.0) + times * work.seconds(rates)

    # Along data, every GPU encodes a part of the tokens, and updates its rows from all.
    add("_topk_kernel", M, few)
    add("_center_kernel", N, few)
    add("_adam_kernel", N, few)
    if fp8:  # every GPU ranks as many candidates of its own as one GPU would
        add("_quantize_kernel", M, few)
        add("_rescore_kernel", M, min(k, rows))
    # Along latent, decoding and dot products are two passes, with a sum of parts in between.
    add("_squared_error_kernel", M, few, 1 + (L > 1))
    parts["decode"] += 12 * M * d / rates.memory * (L > 1)
    return parts
