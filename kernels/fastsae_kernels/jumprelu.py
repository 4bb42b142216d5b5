"""JumpReLU and its L0, with a straight-through gradient for the threshold (arXiv:2407.14435).

    jumprelu(h)[n, f] = h[n, f] 1[h[n, f] > threshold[f]]
    jumprelu_l0(h)[n] = sum_f 1[h[n, f] > threshold[f]]

The derivative of both in the threshold is 0 wherever it exists. With the rectangular kernel
K = 1[|h - threshold| < bandwidth / 2], the straight-through gradients for an output gradient g are

    jumprelu:       h: g 1[h > threshold]    threshold: -threshold / bandwidth sum_n K g
    jumprelu_l0:    h: 0                     threshold: -1 / bandwidth sum_n K g

Sums run over blocks of rows first, then over the blocks, in a fixed order. Both functions are one
op, whose kernels have the constexpr L0. Shapes: N rows (tokens), F latents. Arithmetic is in fp32
(fp64 for fp64 h).
"""

import math

import torch
from torch import Tensor

from ._launch import check_devices, check_shape, rows_at_a_time, use_triton, wide_dtype
from ._op import register, register_constant

# --- reference: the specification -----------------------------------------------------------


class _Reference(torch.autograd.Function):
    """Both functions; the straight-through gradients are written as in the module."""

    @staticmethod
    def forward(ctx, h, threshold, bandwidth, l0):
        ctx.save_for_backward(h, threshold)
        ctx.bandwidth, ctx.l0 = bandwidth, l0
        if l0:
            return (h > threshold).sum(-1, dtype=wide_dtype(h))
        return h.masked_fill(h <= threshold, 0)

    @staticmethod
    def backward(ctx, g):
        h, threshold = ctx.saved_tensors
        K = ((h - threshold) / ctx.bandwidth).abs() < 1 / 2
        if ctx.l0:
            g, slope = g[..., None], -1 / ctx.bandwidth
            dh = None
        else:
            slope = -threshold / ctx.bandwidth
            dh = g * (h > threshold)
        return dh, (slope * K * g).sum_to_size(threshold.shape).to(threshold), None, None


def jumprelu_reference(h: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """[..., F], [F] -> [..., F]"""
    return _Reference.apply(h, threshold, bandwidth, False)


def jumprelu_l0_reference(h: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """[..., F], [F] -> [...]"""
    return _Reference.apply(h, threshold, bandwidth, True)


# --- torch path: what runs without a GPU ----------------------------------------------------


def _jumprelu_torch(h: Tensor, threshold: Tensor, out: Tensor, l0: bool) -> None:
    rows, zero = rows_at_a_time(h, h.shape[1]), h.new_zeros(())
    for x, y in zip(h.split(rows), out.split(rows), strict=True):
        if l0:
            torch.sum(x > threshold, 1, dtype=out.dtype, out=y)
        else:
            torch.where(x <= threshold, zero, x, out=y)


def _jumprelu_backward_torch(
    g: Tensor, h: Tensor, threshold: Tensor, dh: Tensor, half: float, l0: bool
) -> Tensor:
    rows, zero = rows_at_a_time(h, h.shape[1]), g.new_zeros(())
    sums = []
    for start in range(0, len(h), rows):
        some = slice(start, start + rows)
        inside = (h[some] - threshold).abs_() < half
        sums.append(torch.where(inside, g[some], zero).sum(0, dtype=threshold.dtype))
        if not l0:
            torch.where(h[some] > threshold, g[some], zero, out=dh[some])
    return torch.stack(sums).sum(0)


# --- autograd -------------------------------------------------------------------------------


def _new_out(h: Tensor, threshold: Tensor, bandwidth: float, l0: bool) -> Tensor:
    return h.new_empty(h.shape[0], dtype=wide_dtype(h)) if l0 else h.new_empty(h.shape)


def _new_gradients(
    g: Tensor, h: Tensor, threshold: Tensor, bandwidth: float, l0: bool
) -> tuple[Tensor, Tensor]:
    return h.new_empty(0 if l0 else h.shape), threshold.new_empty(threshold.shape)


class _Jumprelu(torch.autograd.Function):
    @staticmethod
    def forward(h: Tensor, threshold: Tensor, bandwidth: float, l0: bool) -> Tensor:
        out = _new_out(h, threshold, bandwidth, l0)
        if not h.numel():
            return out.zero_()
        if use_triton(h):
            from ._jumprelu_kernel import launch_jumprelu as run
        else:
            run = _jumprelu_torch
        run(h.contiguous(), threshold.to(wide_dtype(h)).contiguous(), out, l0)
        return out

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])
        ctx.bandwidth, ctx.l0 = inputs[2:]

    @staticmethod
    def backward(ctx, g):  # g: [N] for l0, else [N, F]
        h, threshold = ctx.saved_tensors
        dh, d_threshold = _jumprelu_backward(g, h, threshold, ctx.bandwidth, ctx.l0)
        return None if ctx.l0 else dh, d_threshold, None, None


def _jumprelu_backward(
    g: Tensor, h: Tensor, threshold: Tensor, bandwidth: float, l0: bool
) -> tuple[Tensor, Tensor]:
    """dh (empty for l0) and the gradient of the threshold."""
    dh, d_threshold = _new_gradients(g, h, threshold, bandwidth, l0)
    if not h.numel():
        return dh, d_threshold.zero_()
    wide = threshold.to(wide_dtype(h)).contiguous()
    if use_triton(h):
        from ._jumprelu_kernel import launch_jumprelu_backward as run
    else:
        run = _jumprelu_backward_torch
    g = (g[:, None] if l0 else g).contiguous()
    sums = run(g, h.contiguous(), wide, dh, bandwidth / 2, l0)
    slope = -1 / bandwidth if l0 else wide / -bandwidth
    return dh, d_threshold.copy_(sums.mul_(slope))


_jumprelu = register(_Jumprelu, _new_out)
_jumprelu_backward = register_constant(_jumprelu_backward, _new_gradients)

# --- public ---------------------------------------------------------------------------------


def _apply(h: Tensor, threshold: Tensor, bandwidth: float, l0: bool) -> Tensor:
    if h.dim() == 0 or not h.is_floating_point():
        raise ValueError(
            f"h must be floating point of shape [..., F], got {h.dtype} of shape {list(h.shape)}"
        )
    check_shape("threshold", threshold, h.shape[-1])
    if not bandwidth > 0:
        raise ValueError(f"bandwidth must be positive, got {bandwidth}")
    check_devices(h=h, threshold=threshold)
    rows = h.reshape(math.prod(h.shape[:-1]), h.shape[-1])
    out = _jumprelu(rows, threshold, float(bandwidth), l0)
    return out.view(h.shape[:-1] if l0 else h.shape)


def jumprelu(h: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """Set entries of h that do not exceed their latent's threshold to 0.

    h [..., F] and threshold [F] floating, bandwidth > 0 -> like h; NaN stays NaN. Differentiable
    once, in h and, straight-through with this bandwidth (arXiv:2407.14435), in threshold. Forward
    reads h and writes a tensor of its size; backward reads h and g and writes one.
    ValueError for wrong shapes or dtypes, and for a bandwidth that is not positive.
    """
    return _apply(h, threshold, bandwidth, l0=False)


def jumprelu_l0(h: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """Count the entries of each row of h that exceed their latent's threshold.

    h [..., F] and threshold [F] floating, bandwidth > 0 -> [...] in float32 (float64 for float64
    h); NaN exceeds nothing. Differentiable once, in threshold only, straight-through with this
    bandwidth (arXiv:2407.14435). Forward and backward each read h once.
    ValueError for wrong shapes or dtypes, and for a bandwidth that is not positive.
    """
    return _apply(h, threshold, bandwidth, l0=True)
