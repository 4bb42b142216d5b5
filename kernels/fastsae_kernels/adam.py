"""Adam for both weights of a dictionary, straight from sparse codes, without a dense gradient.

    dW_dec[f] = sum of value * error over the tokens of latent f     (scatter_outer)
    dW_enc[f] = sum of d_value * x                                   (scatter_outer)
    dW_dec[f] -= (dW_dec[f] . W_dec[f]) W_dec[f]                     rows have norm 1
    m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2                  Adam (arXiv:1412.6980)
    W -= lr * m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)
    W_dec[f] /= |W_dec[f]|

The second moment v may be one number per row: the mean of g^2 over the row then stands for g^2
(arXiv:2406.16793).

Momentum moves rows without a gradient, too. With window = 1 every step visits every row, and the
result is that of torch.optim.Adam on dense gradients. With window = T (lazy updates) a row is
visited when it has a gradient, and at least every T steps. It then catches up on the steps that it
missed:

    W -= sum_j lr_j sqrt(1 - b2^j) / (1 - b1^j) (b1 / sqrt(b2))^(j - t) * m / (sqrt(v) + eps)

over the missed steps j after its last update, t. Until then the encoder reads a row that is up to
T - 1 steps old.
Shapes: N tokens, K active latents per token, F latents, D width, E = N K entries in latent order.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ._launch import check_devices, use_triton
from .dense_adam import AdamStep as AdamStep
from .dense_adam import (
    dense_adam_,
    normalize_rows_,
    remove_parallel_,
    scalars_on,
    seed32,
    stochastic_bf16,
    window_coefficient,
)
from .float8 import Float8Rows, quantize_rows
from .int8 import Int8Rows, quantize_int8
from .latent_major import LatentMajor, sum_runs

BLOCK_BYTES = 1 << 20
"""Size of a block of rows that stays in a CPU's cache with its gradients and moments."""

GPU_BLOCK_BYTES = 64 << 20
"""Size of a block of rows that fits in 512 MB of a GPU with up to seven temporaries."""

WIDEST = 8192
"""The largest D that the kernel supports: a row, its moments and its gradient are in registers."""


class Rows(NamedTuple):
    """A weight matrix [F, D], its Adam moments, and the low-precision copies that GEMMs read."""

    weight: Tensor
    first: Tensor
    """In the weight's dtype, or in bfloat16 with stochastic rounding."""

    second: Tensor
    """[F, D] in the dtype of the first, or one per row, [F, 1] in the weight's."""

    shadow: Tensor | None = None
    """bfloat16 [F, D], kept equal to the weight."""

    quantized: Float8Rows | Int8Rows | None = None
    """An 8-bit copy of the weight: int8 on a CPU, fp8 on a GPU."""

    def refresh(self, rows: slice | Tensor, w: Tensor) -> None:
        """Update these rows of the copies from w, the new rows of the weight."""
        if self.shadow is not None:
            self.shadow[rows] = w.to(self.shadow.dtype)
        if (low := self.quantized) is not None:
            new = quantize_int8(w, low.columns) if isinstance(low, Int8Rows) else quantize_rows(w)
            low.rows.view(torch.uint8)[rows] = new.rows.view(torch.uint8)
            low.scale[rows] = new.scale


class RowGradients(NamedTuple):
    """The gradients of both weights, as sparse weighted sums of tokens per latent."""

    runs: LatentMajor
    values: Tensor
    """[E]: weights of error in dW_dec."""
    error: Tensor
    """[N, D]"""
    d_values: Tensor
    """[E]: weights of x in dW_enc."""
    x: Tensor
    """[N, D]"""
    extra: tuple[Tensor, Tensor, Tensor] | None = None
    """Ascending row indices [n], and dense terms [n, D] of these rows' dW_dec and dW_enc."""

    def contiguous(self) -> "RowGradients":
        """The same gradients in contiguous tensors, as kernels read them."""
        extra = self.extra
        if extra is not None:
            extra = extra[0].contiguous(), extra[1].contiguous(), extra[2].contiguous()
        values, error, d_values, x = (t.contiguous() for t in self[1:5])
        return RowGradients(self.runs, values, error, d_values, x, extra)


class BiasGradients(NamedTuple):
    """Gradients of the biases, which the same sums provide; W_enc is the one before the step."""

    latent: Tensor
    """[F]: sum of d_value over the tokens of each latent, the gradient of b_enc."""
    center: Tensor
    """[D]: latent @ W_enc, the negative gradient of what was subtracted from x."""


class Window(NamedTuple):
    """The state of lazy updates; T = len(history)."""

    updated: Tensor
    """int32 [F]: the step of each row's last update."""
    history: Tensor
    """[T] in the weights' dtype: lr sqrt(1 - b2^t) / (1 - b1^t) of step t at t % T."""


# --- torch path: what runs without a GPU ----------------------------------------------------


def _catch_up_(w: Tensor, m: Tensor, v: Tensor, updated: Tensor, at: AdamStep, window: Window):
    """Apply the missed momentum: the steps after each row's last update."""
    (b1, b2), T = at.betas, len(window.history)
    drift = torch.zeros_like(updated, dtype=w.dtype)
    missed = at.step - 1 - updated
    for j in range(1, T):
        coefficient = window.history[(updated + j) % T] * (b1 / math.sqrt(b2)) ** j
        drift += coefficient.where(missed >= j, 0.0)
    w.sub_(drift[:, None] * m / (v.sqrt() + at.eps))
    m.mul_((b1 ** missed.to(w.dtype))[:, None])
    v.mul_((b2 ** missed.to(w.dtype))[:, None])


class _Rounding(NamedTuple):
    """Stochastic rounding of some rows of a block, the same whichever of its rows are here."""

    key: int
    before: int
    """Rows of the block that other processes have, before those that are here."""
    device: torch.device

    def __call__(self, x: Tensor, number: int) -> Tensor:
        """`number` tells the tensors of a step apart."""
        generator = torch.Generator(self.device)
        generator.manual_seed((self.key + 0x9E3779B1 * number) % 2**32)  # a CPU's takes 32 bits
        return stochastic_bf16(x, generator, self.before)


def _row_blocks(W: Tensor, first_row: int = 0) -> Iterator[tuple[slice, int]]:
    """Rows that are updated at a time, with the first row of their block in the whole matrix, of
    which W has the rows from first_row on."""
    size = BLOCK_BYTES if W.device.type == "cpu" else GPU_BLOCK_BYTES
    rows, stop = max(1, size // (W.shape[1] * W.itemsize)), first_row + len(W)
    for start in range(first_row // rows * rows, stop, rows):
        low, high = max(start, first_row), min(start + rows, stop)
        yield slice(low - first_row, high - first_row), start


def _update_block(
    state: Rows, g: Tensor, rows: slice | Tensor, at: AdamStep, window: Window | None,
    rounded: _Rounding, unit: bool,
) -> None:  # fmt: skip
    """Update some rows of one weight. A slice gives views, which are updated in place; rows of an
    index tensor are copies, which are written back."""
    wide = state.weight.dtype
    w, m, v = (t[rows].to(wide) for t in (state.weight, state.first, state.second))
    if window is not None:
        _catch_up_(w, m, v, window.updated[rows], at, window)
        if unit:
            normalize_rows_(w)
    if unit:
        remove_parallel_(g, w)
    dense_adam_(w, g, m, v, at)
    if unit:
        normalize_rows_(w)
    for number, (moment, new) in enumerate(((state.first, m), (state.second, v))):
        if moment.dtype != wide:
            moment[rows] = rounded(new, 2 * unit + number)
        elif window is not None:
            moment[rows] = new
    if window is not None:
        state.weight[rows] = w
    state.refresh(rows, w)


def _adam_torch(
    decoder: Rows, encoder: Rows, g: RowGradients, at: AdamStep, window: Window | None
) -> BiasGradients:
    """The step in blocks of rows, so that dense gradients exist of one block at a time."""
    latent = sum_runs(g.d_values, g.x.new_ones(len(g.x), 1), g.runs)[:, 0].to(encoder.weight.dtype)
    biases = BiasGradients(latent, latent @ encoder.weight)
    device, first_row = decoder.weight.device, at.first_row
    for block, start in _row_blocks(decoder.weight, first_row):
        key = seed32(at) + at.step + 0x85EBCA6B * start
        rounded = _Rounding(key, first_row + block.start - start, device)
        d_dec = sum_runs(g.values, g.error, g.runs, block).to(decoder.weight.dtype)
        d_enc = sum_runs(g.d_values, g.x, g.runs, block).to(encoder.weight.dtype)
        busy = g.runs.start[block.start : block.stop + 1].diff() > 0
        if g.extra is not None:
            where, extra_dec, extra_enc = g.extra
            edges = torch.tensor([block.start, block.stop], device=where.device)
            first, last = torch.searchsorted(where, edges).tolist()
            local = where[first:last] - block.start
            d_dec.index_add_(0, local, extra_dec[first:last])
            d_enc.index_add_(0, local, extra_enc[first:last])
            busy[local] = True
        rows: slice | Tensor = block
        if window is not None:
            each = torch.arange(block.start, block.stop, device=busy.device)
            rows = each[busy | ((each + at.step) % len(window.history) == 0)]
            d_dec, d_enc = d_dec[rows - block.start], d_enc[rows - block.start]
        _update_block(decoder, d_dec, rows, at, window, rounded, unit=True)
        _update_block(encoder, d_enc, rows, at, window, rounded, unit=False)
        if window is not None:
            window.updated[rows] = at.step
    if window is not None:
        window.history[at.step % len(window.history)].fill_(window_coefficient(at))
    return biases


# --- public ---------------------------------------------------------------------------------


def _check(decoder: Rows, encoder: Rows, g: RowGradients, window: Window | None) -> None:
    """Raise ValueError if a shape, layout, dtype or device is wrong; it names the tensor."""
    (F, D), N, E = decoder.weight.shape, len(g.error), len(g.runs.token)
    expected: dict[str, tuple[Tensor, tuple[int, ...]]] = {}
    for name, state in {"decoder": decoder, "encoder": encoder}.items():
        low = None if state.quantized is None else state.quantized.rows
        parts = state._replace(quantized=low)._asdict()
        expected |= {f"{name}.{part}": (t, (F, D)) for part, t in parts.items() if t is not None}
        first, second, wide = state.first.dtype, state.second.dtype, state.weight.dtype
        if per_row := state.second.shape[1:] == (1,) != (D,):
            expected[f"{name}.second"] = state.second, (F, 1)
        low_first = first == torch.bfloat16 and wide == torch.float32
        if not (first == wide or low_first) or second != (wide if per_row else first):
            raise ValueError(
                f"{name}'s moments must be {wide}, or bfloat16 of float32 weights (a second moment "
                f"per row always {wide}), got {first} and {second}"
            )
    if decoder.first.dtype != encoder.first.dtype:
        raise ValueError(
            f"the moments of decoder and encoder must have one dtype, "
            f"got {decoder.first.dtype}, {encoder.first.dtype}"
        )
    expected |= {"error": (g.error, (N, D)), "x": (g.x, (N, D)), "values": (g.values, (E,))}
    expected |= {"d_values": (g.d_values, (E,)), "runs.start": (g.runs.start, (F + 1,))}
    if window is not None:
        expected["window.updated"] = window.updated, (F,)
    if g.extra is not None:
        rows, extra_dec, extra_enc = g.extra
        expected |= {"extra rows": (rows, (len(extra_dec),))}
        expected |= {"extra of the decoder": (extra_dec, (len(extra_dec), D))}
        expected |= {"extra of the encoder": (extra_enc, (len(extra_dec), D))}
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous and of shape {list(shape)}, got {list(tensor.shape)}"
            )
    check_devices(**{name: tensor for name, (tensor, _) in expected.items()})


def adam_(
    decoder: Rows,
    encoder: Rows,
    gradients: RowGradients,
    at: AdamStep,
    window: Window | None = None,
) -> BiasGradients:
    """One Adam step on both weights of a dictionary, in place, from sparse gradients.

    Decoder rows have norm 1 before and after, and only the part of a gradient that is orthogonal
    to its row counts (arXiv:2406.04093). Without a window, and with a second moment of each entry,
    this is torch.optim.Adam on the dense gradients. With a window (see the module), rows without a
    gradient wait up to T - 1 steps. Deterministic.

    Returns the gradients of the biases, without the extra gradients' share.

    Reads N K D elements of error and of x, and reads and writes F D of each weight and moment, 26
    bytes a parameter in fp32 with a shadow, 18 with bfloat16 moments or with a second moment per
    row, and 14 with both. ValueError for wrong shapes or dtypes.
    """
    gradients, W = gradients.contiguous(), decoder.weight
    _check(decoder, encoder, gradients, window)
    wide = torch.float64 in (gradients.error.dtype, gradients.x.dtype)  # than the kernel's sums
    if W.dtype == torch.float32 and not wide and W.shape[1] <= WIDEST and use_triton(W):
        from ._adam_kernel import launch_adam

        at = at._replace(scalars=scalars_on(at, W.device))
        return BiasGradients(*launch_adam(decoder, encoder, gradients, at, window))
    return _adam_torch(decoder, encoder, gradients, at, window)


def flush_(decoder: Rows, encoder: Rows, at: AdamStep, window: Window) -> None:
    """Apply all pending lazy updates, so that every row is as of `at`, the last step."""
    following = at._replace(step=at.step + 1)
    for state, unit in ((decoder, True), (encoder, False)):
        for block, _ in _row_blocks(state.weight):
            w, updated = state.weight[block], window.updated[block]
            m, v = (t[block].to(w.dtype) for t in (state.first, state.second))
            _catch_up_(w, m, v, updated, following, window)
            state.first[block], state.second[block] = m, v
            if unit:
                normalize_rows_(w)
            state.refresh(block, w)
    window.updated.fill_(at.step)
