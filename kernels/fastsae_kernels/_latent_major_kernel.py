"""The kernels of latent_major.py: one sums chunks, one sums a latent's chunks and other entries.

Shapes: N tokens, K active latents per token, F latents, D width.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch, power_of_2, wide_dtype
from .latent_major import LatentMajor

# --- kernels: all tensors row-major ---------------------------------------------------------


@triton.jit
def load_rows(W_ptr, row, inside, d, D):
    """Load columns d of rows: [R], [R], [BLOCK_D] -> [R, BLOCK_D], 0 where not inside."""
    mask = inside[:, None] & (d < D)[None, :]
    return tl.load(W_ptr + row.to(tl.int64)[:, None] * D + d[None, :], mask=mask, other=0.0)


@triton.jit
def _sum_entries(
    w_ptr, token_ptr, x_ptr, first, last, head, skipped, d, D, acc,
    BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Add the weighted tokens of entries first to last, skipping `skipped` entries at `head`."""
    for start in range(first, last, BLOCK_K):
        place = start + tl.arange(0, BLOCK_K)
        e = tl.where(place < head, place, place + skipped)
        n = tl.load(token_ptr + e, mask=place < last, other=0)
        w = tl.load(w_ptr + e, mask=place < last, other=0.0).to(ACC)
        acc += tl.sum(w[:, None] * load_rows(x_ptr, n, place < last, d, D).to(ACC), axis=0)
    return acc


@triton.jit
def sum_run(
    w_ptr, token_ptr, x_ptr, chunk_ptr, first, last, d, D,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Weighted sum of one latent's tokens; its complete chunks are summed already -> [BLOCK_D]"""
    head = tl.minimum(last, tl.cdiv(first, CHUNK) * CHUNK)
    tail = tl.maximum(head, last // CHUNK * CHUNK)
    acc = tl.zeros((BLOCK_D,), dtype=ACC)
    chunk_ptr += (head // CHUNK).to(tl.int64) * D
    for _ in range(head // CHUNK, tail // CHUNK):
        acc += tl.load(chunk_ptr + d, mask=d < D, other=0.0)
        chunk_ptr += D
    skipped = tail - head
    return _sum_entries(
        w_ptr, token_ptr, x_ptr, first, last - skipped, head, skipped, d, D, acc, BLOCK_K, ACC
    )


@triton.jit
def _sum_chunks_kernel(
    w_ptr, token_ptr, latent_ptr, x_ptr, out_ptr, F, D,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sum one chunk of entries, if all of them have the same latent."""
    c = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first, last = c * CHUNK, (c + 1) * CHUNK
    latent = tl.load(latent_ptr + first)
    if (latent == tl.load(latent_ptr + last - 1)) & (latent < F):
        acc = tl.zeros((BLOCK_D,), dtype=ACC)
        acc = _sum_entries(
            w_ptr, token_ptr, x_ptr, first, last, last, 0, d, D, acc, BLOCK_K, ACC
        )  # fmt: skip
        tl.store(out_ptr + c.to(tl.int64) * D + d, acc, mask=d < D)


@triton.jit
def _sum_runs_kernel(
    w_ptr, token_ptr, start_ptr, x_ptr, chunk_ptr, out_ptr, D,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sum all entries of one latent."""
    f = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first, last = tl.load(start_ptr + f), tl.load(start_ptr + f + 1)
    acc = sum_run(
        w_ptr, token_ptr, x_ptr, chunk_ptr, first, last, d, D, CHUNK, BLOCK_K, BLOCK_D, ACC
    )
    tl.store(out_ptr + f.to(tl.int64) * D + d, acc, mask=d < D)


# --- launchers ------------------------------------------------------------------------------

CHUNK = 128
"""Entries per chunk: a latent with more entries is summed by several programs.

Writing and reading a chunk's sum in fp32 adds 1/32 to the bytes of its rows in bf16.
"""


class Constants(NamedTuple):
    """Constexprs of kernels that loop over rows of x."""

    BLOCK_K: int
    """Rows per iteration, whose loads do not wait for each other."""

    BLOCK_D: int
    """Columns: with Triton's 4 warps up to 8 per thread, one 128-bit load of a row in bf16."""

    ACC: tl.dtype
    """Dtype of sums."""


def constants_for(x: Tensor) -> Constants:
    acc = tl.float64 if x.dtype == torch.float64 else tl.float32
    return Constants(4, min(1024, power_of_2(x.shape[1])), acc)


def launch_blocks(kernel, rows: int, *arguments, x: Tensor, **more: int) -> None:
    """Launch one program for each row and each block of x's columns."""
    D, constants = x.shape[1], constants_for(x)
    grid = rows, -(-D // constants.BLOCK_D)
    launch(kernel, grid, *arguments, D, **more, **constants._asdict())


def launch_sum_chunks(weights: Tensor, x: Tensor, runs: LatentMajor) -> Tensor:
    """Sums of the chunks that lie within one latent's run: [N * K // CHUNK, D] in fp32 (fp64)."""
    wide = wide_dtype(x)
    out = torch.empty(len(runs.token) // CHUNK, x.shape[1], dtype=wide, device=x.device)
    arguments = weights, runs.token, runs.latent, x, out, len(runs.start) - 1
    launch_blocks(_sum_chunks_kernel, len(out), *arguments, x=x, CHUNK=CHUNK)
    return out


def launch_sum_runs(weights: Tensor, x: Tensor, runs: LatentMajor, rows: slice) -> Tensor:
    """Weighted sums of the tokens of each latent in `rows`: [rows, D]"""
    chunks = launch_sum_chunks(weights, x, runs)
    out = x.new_empty(rows.stop - rows.start, x.shape[1])
    arguments = weights, runs.token, runs.start[rows.start :], x, chunks, out
    launch_blocks(_sum_runs_kernel, len(out), *arguments, x=x, CHUNK=CHUNK)
    return out
