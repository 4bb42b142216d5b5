"""Times the parts of a fused TopK step on this CPU, each on a part of its work.

The operations are the step's own, at the run's width and on memory of its size. What grows in
proportion to tokens or latents is timed on some of them and scaled. It takes about a second, where
steps of the run itself would take many.
Shapes: N tokens, K active, F latents, D width.
"""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastsae_kernels import (
    AdamStep,
    RowGradients,
    Rows,
    Window,
    adam_,
    center,
    encode_topk,
    latent_major,
    quantize_int8,
    squared_error,
    topk_indices,
)
from fastsae_kernels.latent_major import LatentMajor
from fastsae_kernels.product import product, tokens_at_a_time
from fastsae_kernels.proof import prepare, select_proved

from .workload import Workload

TABLE_BYTES = 1 << 28
"""Size of a weight whose rows are gathered, and of what is read to fill the caches: more would not
change how often these are missed."""

UPDATED_BYTES = 1 << 24
"""Size of the rows of a weight that Adam is timed on; with gradients and moments, far more than
caches hold."""

DECODED = 4096
"""Tokens that decoding is timed on."""

BATCHES = 4
"""Batches of tokens that one is drawn from, and that a step reads or writes."""

WITH_MOMENTS = 3
"""Arrays per weight: itself and two moments."""

SECONDS, ROUNDS = 0.15, 3
"""Each part is repeated for this long, and at least as often, after a first time that does not
count."""


class Sample(NamedTuple):
    """The part of a run's work that is timed."""

    w: Workload
    generator: torch.Generator
    x: Tensor
    """[N, D]"""
    W: Tensor
    """[F', D]: as many rows as TABLE_BYTES has room for."""
    others: Tensor
    """As large as all weights, moments and batches, up to TABLE_BYTES: they take the place of each
    other in the caches during a step."""

    @classmethod
    def of(cls, w: Workload) -> "Sample":
        generator = torch.Generator().manual_seed(0)
        rows = min(w.own_latents, max(TABLE_BYTES // (4 * w.d_in), 1))
        all_bytes = 4 * (WITH_MOMENTS * w.entries + BATCHES * w.tokens * w.row_width)
        return cls(
            w,
            generator,
            normal(w.tokens // w.axes.data, w.d_in, generator),
            normal(rows, w.d_in, generator),
            torch.ones(min(all_bytes, TABLE_BYTES) // 4),
        )


def normal(rows: int, width: int, generator: torch.Generator) -> Tensor:
    """Normal numbers that repeat after a prime number of them, so that rows differ: drawing all of
    a large weight would take longer than what is timed."""
    few = torch.randn(min(1_000_003, rows * width), generator=generator)
    return few.repeat(-(-rows * width // len(few)))[: rows * width].view(rows, width)


def cpu_step_seconds(w: Workload) -> dict[str, float]:
    """Seconds of each part of a fused step, without dead latents; they add up to the step.

    Takes about a second. Its memory is up to about 600 MB for weights, and a few copies of a batch
    and of its codes. No global random state is used.
    """
    sample = Sample.of(w)
    with torch.no_grad():
        return {
            "encoder": timed_encoder(sample),
            "decode": timed_decoder(sample),
            "optimizer": timed_update(sample),
            "data and counters": timed_rest(sample),
        }


def timed(run: Callable[[], object], read_before: Tensor | None = None) -> float:
    """Median seconds of a call. What is read before each one takes the place in the caches that
    other parts take in a step; it must be none of what the call reads."""
    run()
    times, end = [], time.perf_counter() + SECONDS
    while len(times) < ROUNDS or time.perf_counter() < end:
        if read_before is not None:
            read_before.sum()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def timed_encoder(s: Sample) -> float:
    """The encoder GEMM with top-k, on a chunk of tokens."""
    W, b, k = s.W, torch.zeros(len(s.W)), min(s.w.active, len(s.W))
    x, once, low = s.x[: tokens_at_a_time(s.x, s.w.own_latents)], 0.0, None
    if s.w.bf16_candidates:
        low = prepare(s.x, W, b, k, "value")
        once = timed(lambda: prepare(s.x, W, b, k, "value"))
    if low is not None:
        seconds = timed(lambda: select_proved(x, W, b, low, k, "value"))
    elif s.w.precision == "int8":
        shadow = quantize_int8(W)
        seconds = timed(lambda: encode_topk(x, W, b, k, shadow=shadow))
    else:
        seconds = timed(lambda: topk_indices(product(x, W, b), k))
    return (seconds * len(s.x) / len(x) + once) * s.w.own_latents / len(W)


def timed_decoder(s: Sample) -> float:
    """Reconstructions, errors and the gradients of values, on some tokens."""
    x, bias = s.x[:DECODED], s.x.new_zeros(s.W.shape[1])
    indices = torch.randint(len(s.W), (len(x), s.w.active), generator=s.generator)
    values = torch.ones(indices.shape)
    seconds = timed(lambda: squared_error(values, indices, s.W, bias, x), s.others)
    return seconds * len(s.x) / len(x)


def timed_update(s: Sample) -> float:
    """Weight gradients and Adam, on some rows and on as large a part of all entries."""
    w, width = s.w, s.w.d_in
    rows = min(w.own_latents, max(UPDATED_BYTES // (4 * width), 1))
    part = rows / w.own_latents
    count = max(int(part * w.tokens * w.active), 1)
    latent = torch.randint(rows, (count,), generator=s.generator, dtype=torch.int32).sort().values
    token = torch.randint(w.tokens, (count,), generator=s.generator, dtype=torch.int32)
    start = torch.searchsorted(latent, torch.arange(rows + 1, dtype=torch.int32), out_int32=True)
    runs = LatentMajor(torch.arange(count), token, latent, start)
    x, errors = (normal(w.tokens, width, s.generator) for _ in range(2))
    values = torch.full((count,), 1e-3)
    gradients = RowGradients(runs, values, errors, values, x)
    decoder, encoder = (rows_of(s, rows, name) for name in ("W_dec", "W_enc"))
    window = None
    if w.window > 1:
        window = Window(torch.zeros(rows, dtype=torch.int32), torch.zeros(w.window))
    at = AdamStep(0, 0.0)

    def run() -> None:
        nonlocal at
        at = at._replace(step=at.step + 1, lr=1e-5)
        adam_(decoder, encoder, gradients, at, window)

    return timed(run, s.others) / part


def rows_of(s: Sample, rows: int, name: str) -> Rows:
    """Rows of a weight, of norm 1, with moments and copies as the run keeps them."""
    w = s.w
    weight = torch.nn.functional.normalize(normal(rows, w.d_in, s.generator), dim=1)
    first = torch.zeros_like(weight, dtype=torch.bfloat16 if w.low_moments else None)
    second = weight.new_zeros(rows, 1) if w.row_second else torch.zeros_like(first)
    own = name == "W_enc"
    quantized = quantize_int8(weight) if own and w.precision == "int8" else None
    return Rows(weight, first, second, quantized=quantized)


def timed_rest(s: Sample) -> float:
    """Drawing tokens, standardizing and centering them, sorting codes, and counting what fired."""
    w, N = s.w, s.w.tokens
    data, zero = normal(BATCHES * N, s.x.shape[1], s.generator), s.x.new_zeros(s.x.shape[1])
    rows = torch.randperm(len(data), generator=s.generator)[:N]
    indices = torch.randint(w.own_latents, (N, w.active), generator=s.generator)
    entries = torch.ones(2, N * w.active)
    counters = torch.zeros(w.own_latents, dtype=torch.int64)

    def run() -> None:
        batch = data[rows].sub_(zero).mul_(zero + 1)
        torch.linalg.vector_norm(batch, dim=1)
        center(batch, zero, torch.float32)
        runs = latent_major(indices, w.own_latents)
        entries.mul_(1.0)[:, runs.entry]
        counters.add_(N).masked_fill_(runs.start[1:] > runs.start[:-1], 0)
        batch.sum(0)

    return timed(run, s.others)
