"""Rational activation with trainable coefficients that all latents share (arXiv:2606.14990).

    t = clamp((h - shift) / c_in, -1, 1)
    P = sum_i a[i] t^i              i = 0..p
    S = sum_j b[j - 1] t^j          j = 1..q
    rational(h) = c_out P / Q,      Q = 1 + |S|

The coefficients are fitted on [-1, 1] only, and far outside t^9 overflows; hence the clamp. Where t
is clamped the function is constant, so h, shift and c_in get no gradient.

With r = P / Q and sign(0) = 0, an entry with output gradient g contributes

    h: d / c_in,  d = g c_out (P' - r sign(S) S') / Q where t is not clamped, else 0
    a[i]: g c_out t^i / Q      b[j - 1]: -g c_out r sign(S) t^j / Q
    c_in: -d t / c_in          c_out: g r          shift: -d / c_in

Each program of the backward kernel sums its entries; a second pass adds the programs' sums in a
fixed order. Shapes: h as a matrix [R, C], to which shift is broadcast by two strides; p + 1
coefficients of P, q of S. Arithmetic is in fp32 (fp64 for fp64 h).
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from ._launch import check_devices, use_triton, wide_dtype
from ._op import register, register_constant

Scalars = tuple[Tensor, Tensor, Tensor, Tensor]
"""a, b, c_in, c_out"""


# --- reference: the specification -----------------------------------------------------------


def rational_reference(
    h: Tensor, a: Tensor, b: Tensor, c_in: Tensor, c_out: Tensor, shift: Tensor | float = 0.0
) -> Tensor:
    """[...], [p + 1], [q], [], [] and a shift that broadcasts to h -> [...]"""
    t = ((h - shift) / c_in).clamp(-1, 1)
    P = sum(a[i] * t**i for i in range(len(a)))
    S = sum(b[j - 1] * t**j for j in range(1, len(b) + 1))
    return (c_out * P / (1 + abs(S))).to(h.dtype)


# --- torch path: what runs without a GPU ----------------------------------------------------

CHUNK = 1 << 17
"""Entries that a CPU works on at a time, so that intermediate results stay in the cache."""


def _chunks(*matrices: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split matrices [R, C] into chunks of rows, or a single row into chunks of columns."""
    R, C = matrices[0].shape
    size, dim = (max(1, CHUNK // C), 0) if R > 1 else (CHUNK, 1)
    return zip(*(matrix.split(size, dim) for matrix in matrices), strict=True)


def _polynomial(coefficients: Tensor, t: Tensor) -> Tensor:
    """sum_i coefficients[i] t^i"""
    value = torch.zeros_like(t)
    for c in coefficients.flip(0).unbind():
        torch.addcmul(c, value, t, out=value)
    return value


def _slope(coefficients: Tensor) -> Tensor:
    """Coefficients of a polynomial's derivative."""
    return coefficients[1:] * torch.arange(1, len(coefficients), dtype=coefficients.dtype)


def _moments(w: Tensor, t: Tensor, count: int) -> list[Tensor]:
    """Sums of w t^i for i < count; overwrites w."""
    return [(w.mul_(t) if i else w).sum() for i in range(count)]


def _rational_torch(h: Tensor, shift: Tensor, scalars: Scalars, out: Tensor) -> None:
    wide = wide_dtype(h)
    a, b, c_in, c_out = (c.to(wide) for c in scalars)
    for x, s, y in _chunks(h, shift, out):
        t = x.to(wide, copy=True).sub_(s).div_(c_in).clamp_(-1, 1)
        Q = _polynomial(b, t).mul_(t).abs_().add_(1)
        y.copy_(_polynomial(a, t).mul_(c_out).div_(Q))


def _rational_backward_torch(
    g: Tensor, h: Tensor, shift: Tensor, scalars: Scalars, dh: Tensor
) -> Tensor:
    """Writes dh; returns the concatenated gradients of a, b, c_in and c_out."""
    wide = wide_dtype(h)
    a, b, c_in, c_out = (c.to(wide) for c in scalars)
    b_from_0, sums = pad(b, (1, 0)), []
    for g_part, h_part, s, out in _chunks(g, h, shift, dh):
        g_part, x = g_part.to(wide), h_part.to(wide, copy=True).sub_(s)
        t = (x / c_in).clamp_(-1, 1)
        S = _polynomial(b_from_0, t)
        Q = S.abs().add_(1)
        r = _polynomial(a, t).div_(Q)
        signed_r = S.sign_().mul_(r)
        w = (g_part * c_out).div_(Q)
        d = _polynomial(_slope(b_from_0), t).mul_(signed_r)
        d = _polynomial(_slope(a), t).sub_(d).mul_(w).div_(c_in)
        d = d.where(x.abs_() <= c_in.abs(), 0.0)
        out.copy_(d)
        u = signed_r.mul_(w).mul_(t).neg_()
        sums += _moments(w, t, len(a)) + _moments(u, t, len(b))
        sums += [d.mul_(t).sum().neg_(), r.mul_(g_part).sum()]
    return torch.stack(sums).view(-1, len(a) + len(b) + 2).sum(0)


# --- autograd -------------------------------------------------------------------------------


def _as_matrix(shift: Tensor, h: Tensor) -> Tensor:
    """shift expanded to the shape of h, as [R, C]: with R = 1 if possible, and usually a view.

    It is copied only if shift is broadcast along a dimension between others.
    """
    shift = shift.expand(h.shape).reshape(-1, h.shape[-1] if h.dim() else 1)
    row, column = shift.stride()
    return shift.view(1, -1) if row == column * shift.shape[1] else shift


class _Rational(torch.autograd.Function):
    @staticmethod
    def forward(
        h: Tensor, a: Tensor, b: Tensor, c_in: Tensor, c_out: Tensor, shift: Tensor
    ) -> Tensor:
        out = torch.empty(h.shape, dtype=h.dtype, device=h.device)
        if h.numel():
            matrix, scalars = _as_matrix(shift, h), (a.contiguous(), b.contiguous(), c_in, c_out)
            if use_triton(h):
                from ._rational_kernel import launch_rational as run
            else:
                run = _rational_torch
            run(h.contiguous().view(matrix.shape), matrix, scalars, out.view(matrix.shape))
        return out

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):  # g: [...]
        h, a, b, c_in, c_out, shift = ctx.saved_tensors
        need_shift = ctx.needs_input_grad[5]
        dtype = torch.promote_types(h.dtype, shift.dtype) if need_shift else h.dtype
        dh, sums = _rational_backward(g, h, a, b, c_in, c_out, shift, dtype)
        da, db, dc_in, dc_out = sums.split([a.shape[0], b.shape[0], 1, 1])
        return (
            dh.to(h.dtype),
            da.to(a.dtype),
            db.to(b.dtype),
            dc_in[0].to(c_in.dtype),
            dc_out[0].to(c_out.dtype),
            -dh.sum_to_size(shift.shape).to(shift.dtype) if need_shift else None,
        )


def _rational_backward(
    g: Tensor, h: Tensor, a: Tensor, b: Tensor, c_in: Tensor, c_out: Tensor, shift: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dh in the given dtype, and the concatenated gradients of a, b, c_in and c_out: [p + q + 3]"""
    dh = torch.empty(h.shape, dtype=dtype, device=h.device)
    if not h.numel():
        return dh, h.new_zeros(len(a) + len(b) + 2, dtype=wide_dtype(h))
    matrix, scalars = _as_matrix(shift, h), (a.contiguous(), b.contiguous(), c_in, c_out)
    g, h = (x.contiguous().view(matrix.shape) for x in (g, h))
    if use_triton(h):
        from ._rational_kernel import launch_rational_backward as run
    else:
        run = _rational_backward_torch
    return dh, run(g, h, matrix, scalars, dh.view(matrix.shape))


def _fake_backward(g, h, a, b, c_in, c_out, shift, dtype):
    sums = h.new_empty(a.shape[0] + b.shape[0] + 2, dtype=wide_dtype(h))
    return h.new_empty(h.shape, dtype=dtype), sums


_rational = register(_Rational, lambda h, a, b, c_in, c_out, shift: h.new_empty(h.shape))
_rational_backward = register_constant(_rational_backward, _fake_backward)

# --- public ---------------------------------------------------------------------------------


def _check(name: str, x: Tensor, fits: bool, shape: str) -> None:
    if not (fits and x.is_floating_point()):
        raise ValueError(
            f"{name} must be floating point of {shape}, got {x.dtype} of shape {list(x.shape)}"
        )


def rational(
    h: Tensor,
    a: Tensor,
    b: Tensor,
    c_in: Tensor | float,
    c_out: Tensor | float,
    shift: Tensor | float = 0.0,
) -> Tensor:
    """c_out P(t) / Q(t) of each entry, with t = clamp((h - shift) / c_in, -1, 1); see the module.

    h floating of any shape, such as a code's values [N, K]; a [p + 1] and b [q] floating; c_in (not
    0) and c_out numbers or tensors without dimensions; shift a number or a tensor that broadcasts
    to h -> like h. Differentiable once, in all of them (arXiv:2606.14990).
    Forward reads h and writes a tensor of its size, with 2 (p + q) FLOPs per entry; backward also
    reads g, with 6 (p + q) FLOPs. ValueError for wrong shapes or dtypes.
    """
    c_in, c_out, shift = (
        c if isinstance(c, Tensor) else h.new_full((), c, dtype=wide_dtype(h))
        for c in (c_in, c_out, shift)
    )
    _check("h", h, True, "any shape")
    _check("a", a, a.dim() == 1 and len(a) > 0, "shape [p + 1]")
    _check("b", b, b.dim() == 1 and len(b) > 0, "shape [q], q at least 1")
    _check("c_in", c_in, c_in.dim() == 0, "shape []")
    _check("c_out", c_out, c_out.dim() == 0, "shape []")
    sizes = zip(reversed(shift.shape), reversed(h.shape), strict=False)
    fits = shift.dim() <= h.dim() and all(s in (1, n) for s, n in sizes)
    _check("shift", shift, fits, f"a shape that broadcasts to h's, {list(h.shape)}")
    check_devices(h=h, a=a, b=b, c_in=c_in, c_out=c_out, shift=shift)
    return _rational(h, a, b, c_in, c_out, shift)
