"""The kernels of jumprelu.py; the constexpr L0 selects one of its two functions.

Shapes: N rows (tokens), F latents.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch, power_of_2

# --- kernels: all tensors row-major ---------------------------------------------------------


@triton.jit
def _jumprelu_kernel(
    h_ptr, threshold_ptr, out_ptr, N, F,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, L0: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A block of jumprelu; or with L0, the counts of active entries in its rows."""
    across = tl.cdiv(F, COLUMNS)
    n = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    f = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    threshold = tl.load(threshold_ptr + f, mask=f < F, other=0.0).to(ACC)[None, :]
    offset, inside = n[:, None] * F + f[None, :], (n < N)[:, None] & (f < F)[None, :]
    h = tl.load(h_ptr + offset, mask=inside, other=0.0).to(ACC)
    if L0:
        count = tl.sum((h > threshold).to(ACC), axis=1)  # padding does not count: 0 > 0 is false
        tl.store(out_ptr + n * across + tl.program_id(0) % across, count, mask=n < N)
    else:
        tl.store(out_ptr + offset, tl.where(h <= threshold, 0.0, h), mask=inside)


@triton.jit
def _jumprelu_backward_kernel(
    g_ptr, h_ptr, threshold_ptr, dh_ptr, sums_ptr, N, F,
    half: tl.float64,  # pyright: ignore[reportInvalidTypeForm]
    SPAN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    L0: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dh unless L0, and sums of g inside the window, for SPAN rows of some columns."""
    across = tl.cdiv(F, COLUMNS)
    span = (tl.program_id(0) // across).to(tl.int64)
    first = span * SPAN
    f = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    threshold = tl.load(threshold_ptr + f, mask=f < F, other=0.0).to(ACC)[None, :]
    half = tl.full((), half, dtype=ACC)
    acc = tl.zeros((ROWS, COLUMNS), dtype=ACC)
    for start in range(0, SPAN, ROWS):
        n = first + start + tl.arange(0, ROWS)
        offset, inside = n[:, None] * F + f[None, :], (n < N)[:, None] & (f < F)[None, :]
        h = tl.load(h_ptr + offset, mask=inside, other=0.0).to(ACC)
        if L0:
            g = tl.load(g_ptr + n, mask=n < N, other=0.0).to(ACC)[:, None]
        else:
            g = tl.load(g_ptr + offset, mask=inside, other=0.0).to(ACC)
            tl.store(dh_ptr + offset, tl.where(h > threshold, g, 0.0), mask=inside)
        acc += tl.where(tl.abs(h - threshold) < half, g, 0.0)
    tl.store(sums_ptr + span * F + f, tl.sum(acc, axis=0), mask=f < F)


# --- launchers ------------------------------------------------------------------------------

BLOCK = 4096
"""Entries per iteration: up to 32 for each thread of Triton's 4 warps."""

COLUMNS = 1024
"""Maximum columns of a block: enough for wide loads, and 4 rows share the thresholds."""

SPAN = 64
"""Rows that a program of the backward kernel sums: the sums take 1/32 of the bytes of bf16 h."""


def _constants(h: Tensor, l0: bool) -> dict[str, Any]:
    """The constexprs of both kernels."""
    columns = min(COLUMNS, power_of_2(h.shape[1]))
    acc = tl.float64 if h.dtype == torch.float64 else tl.float32
    return {"ROWS": BLOCK // columns, "COLUMNS": columns, "L0": l0, "ACC": acc}


def launch_jumprelu(h: Tensor, threshold: Tensor, out: Tensor, l0: bool) -> None:
    """Contiguous [N, F], [F]; writes [N, F], or with l0 [N]."""
    N, F = h.shape
    constants = _constants(h, l0)
    across = -(-F // constants["COLUMNS"])
    # A grid of one axis, whose size is not limited: a code's values can be one row of many blocks.
    grid = (-(-N // constants["ROWS"]) * across,)
    counts = out.new_empty(N, across) if l0 else out
    launch(_jumprelu_kernel, grid, h, threshold, counts, N, F, **constants)
    if l0:
        torch.sum(counts, 1, out=out)


def launch_jumprelu_backward(
    g: Tensor, h: Tensor, threshold: Tensor, dh: Tensor, half: float, l0: bool
) -> Tensor:
    """Writes dh [N, F] unless l0; returns the sums of g inside the window, [F]."""
    N, F = h.shape
    constants = _constants(h, l0)
    span = max(SPAN, constants["ROWS"])
    spans = -(-N // span)
    sums, grid = threshold.new_empty(spans, F), (spans * -(-F // constants["COLUMNS"]),)
    launch(
        _jumprelu_backward_kernel,
        grid,
        *(g, h, threshold, dh, sums, N, F, half),
        SPAN=span,
        **constants,
    )
    return sums.sum(0)
