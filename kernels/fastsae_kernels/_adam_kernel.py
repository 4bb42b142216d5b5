"""The kernel of adam.py: one program per latent takes both of its rows through a whole step.

Rows, moments and gradients stay in registers: a row is read once and written once.
Shapes: N tokens, K active latents per token, F latents, D width, E = N K entries in latent order.
"""

import triton
import triton.language as tl

from ._latent_major_kernel import sum_run

# --- kernel: all tensors row-major ----------------------------------------------------------


@triton.jit
def _catch_up(updated, step, history_ptr, beta1, beta2, WINDOW: tl.constexpr):
    """What steps updated + 1 to step - 1, without a gradient, did to a row.

    They moved it by -drift * m / sqrt(v) and left m * decay1, v * decay2.
    """
    drift, decay1, decay2 = 0.0, 1.0, 1.0
    rho, power = beta1 / tl.sqrt(beta2), 1.0
    for missed in range(updated + 1, step):
        power *= rho
        decay1 *= beta1
        decay2 *= beta2
        drift += power * tl.load(history_ptr + missed % WINDOW)  # pyright: ignore
    return drift, decay1, decay2


@triton.jit
def _mix(x):
    """A bijection of 32 bits that looks random, the last step of MurmurHash3 -> uint32"""
    x = x.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _round_bf16(x, bits):
    """float32 that bfloat16 holds exactly, away from 0 as often as 16 random bits say."""
    rounded = (x.to(tl.int32, bitcast=True) + bits.to(tl.int32)) & -65536
    return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)


@triton.jit
def _update_row(
    W_ptr, m_ptr, v_ptr, shadow_ptr, extra_ptr, g, f, slot, caught_up, scalars, seed, step, d, D,
    UNIT: tl.constexpr, WINDOW: tl.constexpr, STOCHASTIC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Catch up, constrain the gradient, Adam, constrain the row."""
    lr, root2, beta1, beta2, rest1, rest2, eps = scalars
    at, mask = f.to(tl.int64) * D + d, d < D
    w = tl.load(W_ptr + at, mask=mask, other=0.0).to(ACC)
    m = tl.load(m_ptr + at, mask=mask, other=0.0).to(ACC)
    v = tl.load(v_ptr + at, mask=mask, other=0.0).to(ACC)
    if extra_ptr is not None:
        at_slot = slot.to(tl.int64) * D + d
        g += tl.load(extra_ptr + at_slot, mask=mask & (slot >= 0), other=0.0).to(ACC)
    if WINDOW > 1:
        drift, decay1, decay2 = caught_up
        w -= drift * m / (tl.sqrt(v) + eps)
        m, v = m * decay1, v * decay2
        if UNIT:
            w /= tl.sqrt(tl.sum(w * w))
    if UNIT:
        g -= tl.sum(g * w) * w
    m += rest1 * (g - m)
    v = beta2 * v + rest2 * g * g
    w -= lr * m / (tl.sqrt(v) / root2 + eps)
    if UNIT:
        w /= tl.sqrt(tl.sum(w * w))
    tl.store(W_ptr + at, w, mask=mask)
    if shadow_ptr is not None:
        tl.store(shadow_ptr + at, w, mask=mask)
    if STOCHASTIC:
        bits = _mix(_mix(_mix(d ^ seed) + f) + 2 * step + UNIT)
        m, v = _round_bf16(m, bits & 0xFFFF), _round_bf16(v, bits >> 16)
    tl.store(m_ptr + at, m, mask=mask)
    tl.store(v_ptr + at, v, mask=mask)


@triton.jit(do_not_specialize=["step", "seed"])
def _adam_kernel(
    W_dec_ptr, m_dec_ptr, v_dec_ptr, shadow_dec_ptr,
    W_enc_ptr, m_enc_ptr, v_enc_ptr, shadow_enc_ptr,
    start_ptr, token_ptr,  # entries in latent order
    values_ptr, error_ptr, chunk_dec_ptr,  # [E], [N, D], sums of whole chunks
    d_values_ptr, x_ptr, chunk_enc_ptr,
    slot_ptr, extra_dec_ptr, extra_enc_ptr,  # [F]: row of the extra gradients, or -1
    updated_ptr, history_ptr,  # [F]: step of the last update; [WINDOW]
    D, step, seed, lr, root2, beta1, beta2, rest1, rest2, eps,
    WINDOW: tl.constexpr, STOCHASTIC: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    f = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    first, last = tl.load(start_ptr + f), tl.load(start_ptr + f + 1)
    slot = -1
    if slot_ptr is not None:
        slot = tl.load(slot_ptr + f)
    caught_up = 0.0, 1.0, 1.0
    if WINDOW > 1:
        if (first == last) & (slot < 0) & ((step + f) % WINDOW != 0):
            return
        updated = tl.load(updated_ptr + f)
        caught_up = _catch_up(updated, step, history_ptr, beta1, beta2, WINDOW)
    scalars = lr, root2, beta1, beta2, rest1, rest2, eps
    g = sum_run(
        values_ptr, token_ptr, error_ptr, chunk_dec_ptr, first, last, d, D,
        CHUNK, BLOCK_K, BLOCK_D, ACC,
    )  # fmt: skip
    _update_row(
        W_dec_ptr, m_dec_ptr, v_dec_ptr, shadow_dec_ptr, extra_dec_ptr, g, f, slot, caught_up,
        scalars, seed, step, d, D, True, WINDOW, STOCHASTIC, ACC,
    )  # fmt: skip
    g = sum_run(
        d_values_ptr, token_ptr, x_ptr, chunk_enc_ptr, first, last, d, D,
        CHUNK, BLOCK_K, BLOCK_D, ACC,
    )  # fmt: skip
    _update_row(
        W_enc_ptr, m_enc_ptr, v_enc_ptr, shadow_enc_ptr, extra_enc_ptr, g, f, slot, caught_up,
        scalars, seed, step, d, D, False, WINDOW, STOCHASTIC, ACC,
    )  # fmt: skip
    if WINDOW > 1:  # last: every warp has read it by the time the rows' sums are known
        tl.store(updated_ptr + f, step)
