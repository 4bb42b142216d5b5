"""The kernels of adam.py: one runs a full Adam step on rows of a weight, one selects the rows.

Rows, moments and gradients stay in registers: a row is read once and written once. A program loops
over a range of neighboring rows and visits those that are due.
Shapes: N tokens, K active latents per token, F latents, D width, E = N K entries in latent order.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._float8_kernel import quantize_row, warps_for_row
from ._latent_major_kernel import CHUNK, launch_sum_chunks, sum_run
from ._launch import capability, launch, power_of_2

if TYPE_CHECKING:
    from .adam import RowGradients, Rows, Window
    from .dense_adam import AdamStep

# --- kernels: all tensors row-major ---------------------------------------------------------


@triton.jit
def _scalar(scalars_ptr, n: tl.constexpr):
    return tl.load(scalars_ptr + n).to(tl.float32, bitcast=True)


@triton.jit
def _visits_kernel(
    start_ptr, slot_ptr, updated_ptr, history_ptr, scalars_ptr,
    row_ptr, missed_ptr, count_ptr, table_ptr,  # [F], [F], [programs]; [3, BLOCK_T]
    F, beta1, beta2,
    WINDOW: tl.constexpr, ROWS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Which of a program's rows are due, how many steps they missed, and a table to catch up.

    k missed steps move a row by -table[0, k] m / sqrt(v) and scale m by table[1, k] and v by
    table[2, k]. All rows that missed k steps were last visited at the same step, so entry k holds
    for all of them.
    """
    p = tl.program_id(0)
    step = tl.load(scalars_ptr)
    f = p * ROWS + tl.arange(0, ROWS)
    inside = f < F
    first = tl.load(start_ptr + f, mask=inside, other=0)
    last = tl.load(start_ptr + f + 1, mask=inside, other=0)
    due = (last > first) | ((f + step) % WINDOW == 0)
    if slot_ptr is not None:
        due |= tl.load(slot_ptr + f, mask=inside, other=-1) >= 0
    due &= inside
    at = p * ROWS + tl.cumsum(due.to(tl.int32), 0) - 1
    updated = tl.load(updated_ptr + f, mask=due, other=0)
    tl.store(row_ptr + at, f, mask=due)
    tl.store(missed_ptr + at, step - 1 - updated, mask=due)
    tl.store(updated_ptr + f, step, mask=due)
    tl.store(count_ptr + p, tl.sum(due.to(tl.int32), 0))
    if p == 0:
        k = tl.arange(0, BLOCK_T)
        drift = tl.zeros((BLOCK_T,), dtype=tl.float32)
        decay1, decay2 = drift + 1, drift + 1
        rho, power = beta1 / tl.sqrt(beta2), 1.0
        for j in range(1, WINDOW):
            power *= rho
            missed = (j <= k) & (k < WINDOW) & (k < step)
            past = tl.load(history_ptr + (step - 1 - k + j) % WINDOW, mask=missed, other=0.0)
            drift += power * past
            decay1 = tl.where(missed, decay1 * beta1, decay1)
            decay2 = tl.where(missed, decay2 * beta2, decay2)
        tl.store(table_ptr + k, drift)
        tl.store(table_ptr + BLOCK_T + k, decay1)
        tl.store(table_ptr + 2 * BLOCK_T + k, decay2)
        tl.debug_barrier()
        tl.store(history_ptr + step % WINDOW, _scalar(scalars_ptr, 6))


@triton.jit
def _mix(x):
    """A hash that is a bijection of 32 bits, the final mix of MurmurHash3 -> uint32"""
    x = x.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _round_bf16(x, bits):
    """Stochastic rounding to bfloat16, as float32, with 16 random bits.

    Adding them carries into the upper half with the probability that makes the mean exact.
    """
    rounded = (x.to(tl.int32, bitcast=True) + bits.to(tl.int32)) & -65536
    return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)


@triton.jit
def _sum_weights(w_ptr, first, last, CHUNK: tl.constexpr):
    """Sum of w over entries first to last."""
    total = 0.0
    for start in range(first, last, CHUNK):
        e = start + tl.arange(0, CHUNK)
        total += tl.sum(tl.load(w_ptr + e, mask=e < last, other=0.0).to(tl.float32), 0)
    return total


@triton.jit
def _adam_kernel(
    W_ptr, m_ptr, v_ptr, shadow_ptr, row8_ptr, scale8_ptr,
    start_ptr, token_ptr, w_ptr, x_ptr, chunk_ptr,  # entries in latent order, sums of whole chunks
    slot_ptr, extra_ptr,  # [F]: row of the extra gradients, or -1
    row_ptr, missed_ptr, count_ptr, table_ptr,  # of _visits_kernel; None to visit every row
    bias_ptr, center_ptr,  # [F], [programs, D]: sums of w, and of these times W; or None
    scalars_ptr, F, beta1, beta2, rest1, rest2, eps, D: tl.constexpr,
    UNIT: tl.constexpr, PER_ROW: tl.constexpr, STOCHASTIC: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One Adam step on a program's rows: gradient, catch-up, update, and the weight's copies."""
    p = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    mask = d < D
    begin = p * ROWS
    end = tl.minimum(begin + ROWS, F)
    if count_ptr is not None:
        end = begin + tl.load(count_ptr + p)
    center = tl.zeros((BLOCK_D,), dtype=tl.float32)
    f, first, last, following = begin, begin, begin, begin
    if row_ptr is not None:
        f = tl.load(row_ptr + begin, mask=begin < end, other=0)
        first, last = tl.load(start_ptr + f), tl.load(start_ptr + f + 1)
    for i in tl.range(begin, end, disable_licm=True):
        if row_ptr is None:
            f = i
            first, last = tl.load(start_ptr + f), tl.load(start_ptr + f + 1)
        at = f.to(tl.int64) * D + d
        w = tl.load(W_ptr + at, mask=mask, other=0.0, eviction_policy="evict_first")
        m = tl.load(m_ptr + at, mask=mask, other=0.0, eviction_policy="evict_first")
        if PER_ROW:
            v = tl.load(v_ptr + f)
        else:
            v = tl.load(v_ptr + at, mask=mask, other=0.0, eviction_policy="evict_first")
        if row_ptr is not None:  # prefetch the next row's index, so that nothing waits for it
            following = tl.load(row_ptr + i + 1, mask=i + 1 < end, other=0)
        g = sum_run(
            w_ptr, token_ptr, x_ptr, chunk_ptr, first, last, d, D,
            CHUNK, BLOCK_K, BLOCK_D, tl.float32,
        )  # fmt: skip
        if center_ptr is not None:
            bias = _sum_weights(w_ptr, first, last, CHUNK)
            tl.store(bias_ptr + f, bias)
            center += bias * w
        if extra_ptr is not None:
            slot = tl.load(slot_ptr + f)
            at_slot = slot.to(tl.int64) * D + d
            g += tl.load(extra_ptr + at_slot, mask=mask & (slot >= 0), other=0.0).to(tl.float32)
        if row_ptr is not None:
            first, last = tl.load(start_ptr + following), tl.load(start_ptr + following + 1)
        m, v = m.to(tl.float32), v.to(tl.float32)
        if missed_ptr is not None:
            missed = tl.load(missed_ptr + i)
            if missed > 0:
                w -= tl.load(table_ptr + missed) * (m / (tl.sqrt(v) + eps))
                m *= tl.load(table_ptr + BLOCK_T + missed)
                v *= tl.load(table_ptr + 2 * BLOCK_T + missed)
                if UNIT:
                    w *= 1 / tl.sqrt(tl.sum(w * w))
        if UNIT:
            g -= tl.sum(g * w) * w
        m += rest1 * (g - m)
        lr, root2 = _scalar(scalars_ptr, 4), _scalar(scalars_ptr, 5)
        square = g * g
        if PER_ROW:
            square = tl.sum(square) / D
        v = beta2 * v + rest2 * square
        w -= lr * root2 * (m / (tl.sqrt(v) + eps * root2))
        if UNIT:
            w *= 1 / tl.sqrt(tl.sum(w * w))
        tl.store(W_ptr + at, w, mask=mask, eviction_policy="evict_first")
        if shadow_ptr is not None:
            tl.store(shadow_ptr + at, w, mask=mask, eviction_policy="evict_first")
        if row8_ptr is not None:
            row8, scale8 = quantize_row(w)  # pyright: ignore
            tl.store(row8_ptr + at, row8, mask=mask, eviction_policy="evict_first")
            tl.store(scale8_ptr + f, scale8)
        if STOCHASTIC:
            step, seed = tl.load(scalars_ptr), tl.load(scalars_ptr + 1)
            bits = _mix(d ^ _mix(_mix(seed + f) + 2 * step + UNIT))
            m = _round_bf16(m, bits & 0xFFFF)
            if not PER_ROW:
                v = _round_bf16(v, bits >> 16)
        tl.store(m_ptr + at, m, mask=mask, eviction_policy="evict_first")
        if PER_ROW:
            tl.store(v_ptr + f, v)
        else:
            tl.store(v_ptr + at, v, mask=mask, eviction_policy="evict_first")
        if row_ptr is not None:
            f = following
    if center_ptr is not None:
        tl.store(center_ptr + p.to(tl.int64) * D + d, center, mask=mask)


# --- launchers ------------------------------------------------------------------------------

PROGRAMS = 2048
"""Maximum number of programs; there are more than half as many. Enough for 8 or more waves, so that
all multiprocessors finish at about the same time, and few enough that each visits several rows. The
number, and so the order of every sum, does not depend on the GPU."""

WIDE = 2048
"""Above this D, registers are capped so that a multiprocessor holds two programs of D = 4096: one
waits for memory while the other computes. Half as many columns per thread with half the registers
does not work, since a third of the registers hold addresses. Narrower programs can use a few more
registers, and 3 to 6 of them still fit."""


def launch_options(x: Tensor, D: int, unit: bool, float8: bool) -> dict[str, int]:
    """Warps, register cap, and rows of x to gather at a time: as many as fit without spills.

    The encoder's programs also hold a row of sums for the bias, so they gather fewer fp32 rows.
    """
    half, wide = x.element_size() == 2, D > WIDE
    if half and 512 < D <= 768 and not float8 and capability(x)[0] > 8:  # elsewhere it would spill
        # One warp with 24 columns per thread: with two, a quarter of the threads would be idle.
        return {"num_warps": 1, "maxnreg": 168, "BLOCK_K": 4}
    rows = (4 if wide else 8) if half else (4 if unit else 1)
    return {"num_warps": warps_for_row(D), "maxnreg": 128 if wide else 160, "BLOCK_K": rows}


def launch_visits(
    runs_start: Tensor, slot: Tensor | None, at: "AdamStep", window: "Window", rows: int
) -> tuple[Tensor, ...]:
    """Rows that are due (each program's in its own range), missed steps, counts and the table."""
    F, T = len(window.updated), len(window.history)
    row, missed = torch.empty_like(window.updated), torch.empty_like(window.updated)
    count = torch.empty(-(-F // rows), dtype=torch.int32, device=row.device)
    table = torch.empty(3, power_of_2(T), dtype=torch.float32, device=row.device)
    launch(
        _visits_kernel,
        (len(count),),
        *(runs_start, slot, *window, at.scalars),
        *(row, missed, count, table),
        F,
        *at.betas,
        WINDOW=T,
        ROWS=rows,
        BLOCK_T=table.shape[1],
        num_warps=min(4, max(1, rows // 128)),
    )
    return row, missed, count, table


def launch_adam(
    decoder: "Rows", encoder: "Rows", g: "RowGradients", at: "AdamStep", window: "Window | None"
) -> tuple[Tensor, Tensor]:
    """Run the step on decoder and encoder; returns the gradients of both biases."""
    F, D = decoder.weight.shape
    new = decoder.weight.new_zeros if window is not None else decoder.weight.new_empty
    rows = max(4, power_of_2(-(-F // PROGRAMS)))
    programs, block_d = -(-F // rows), power_of_2(D)
    slot = extra_dec = extra_enc = None
    if g.extra is not None:
        where, extra_dec, extra_enc = g.extra
        slot = torch.full((F,), -1, dtype=torch.int32, device=where.device)
        slot[where] = torch.arange(len(where), dtype=torch.int32, device=where.device)
    visits = (None,) * 4
    if window is not None:
        visits = launch_visits(g.runs.start, slot, at, window, rows)
    bias, center = new(F), torch.empty(programs, D, device=decoder.weight.device)
    sides = (
        (decoder, g.values, g.error, extra_dec, (None, None), True),
        (encoder, g.d_values, g.x, extra_enc, (bias, center), False),
    )
    for state, weights, x, extra, sums, unit in sides:
        launch(
            _adam_kernel,
            (programs,),
            *(*state[:4], *(state.quantized or (None, None))),
            *(g.runs.start, g.runs.token, weights, x, launch_sum_chunks(weights, x, g.runs)),
            *(slot, extra),
            *visits,
            *sums,
            *(at.scalars, F, *at.betas, 1 - at.betas[0], 1 - at.betas[1], at.eps),
            D=D,
            UNIT=unit,
            PER_ROW=state.second.shape[1] != D,
            STOCHASTIC=state.first.dtype != state.weight.dtype,
            ROWS=rows,
            BLOCK_T=1 if window is None else power_of_2(len(window.history)),
            CHUNK=CHUNK,
            BLOCK_D=block_d,
            **launch_options(x, D, unit, state.quantized is not None),
        )
    return bias, center.sum(0)
