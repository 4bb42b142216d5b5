"""Algorithms for the rotation trick's gradients; rotation.py has their formulas and costs.

In mode "dense", `gram_backward` multiplies the weights with each other and never forms all
pre-activations. On a GPU, a single kernel (_rotation_kernel.py) does the rest per token.
`dense_backward` recomputes h and g for a chunk of tokens at a time. `support_backward` is that of
mode "support".
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vecdot

from ._launch import rows_at_a_time, use_triton
from .encode import straight_through
from .latent_major import latent_major, sum_runs
from .sparse import decode, gather_dot

# --- inputs of the algorithms ---------------------------------------------------------------


class Layer(NamedTuple):
    """The inputs from which h and W_dec d_recon follow."""

    x: Tensor
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    d_recon: Tensor


class Code(NamedTuple):
    """The code q, the sparse part t of g, and q . q, q . g and q . t of each token, [N]."""

    values: Tensor
    indices: Tensor
    t: Tensor
    qq: Tensor
    qg: Tensor
    qt: Tensor


Terms = tuple[Tensor, Tensor, Tensor]
"""The terms of |h|^2: h W_enc [N, D], W_enc^T b_enc [D] and |b_enc|^2; or those of h . g:
d_recon C [N, D], d_recon [N, D_out] and W_dec^T b_enc [D_out]."""


Gradients = tuple[Tensor, Tensor, Tensor]
"""dx, dW_enc and db_enc; empty where not needed."""


def active_gradient(layer: Layer, values: Tensor, indices: Tensor, d_values: Tensor) -> Tensor:
    """g of the listed latents [N, K]; d_values of inactive entries are ignored."""
    g = gather_dot(layer.d_recon, indices, layer.W_dec) + d_values
    return g.where(values != 0, 0)


def code_of(layer: Layer, values: Tensor, indices: Tensor, d_values: Tensor) -> Code:
    """The Code of a batch."""
    g, t = active_gradient(layer, values, indices, d_values), d_values.where(values != 0, 0)
    return Code(values, indices, t, *((values * other).sum(1) for other in (values, g, t)))


def _coefficients(code: Code, hh: Tensor, hg: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From |h|^2 and h . g [N]: a [N, 1], p [N, 1], u [N, K]"""
    none = code.qq == 0
    q = code.qq.masked_fill(none, 1).sqrt()
    h = torch.maximum(hh, code.qq).masked_fill(none, 1).sqrt()
    a = (q / h).masked_fill(none, 0)
    s = (hg / h + code.qg / q) / (1 + a)
    p = a * (2 * code.qg / q - s) / h
    u = torch.addcmul(a[:, None] * code.t, (-a * s / q)[:, None], code.values)
    return a[:, None], p[:, None], u


# --- mode "support" -------------------------------------------------------------------------


def support_backward(
    layer: Layer, values: Tensor, indices: Tensor, d_values: Tensor, needs: Sequence[bool],
    gram: bool,
) -> Gradients:  # fmt: skip
    """Gradients of the active latents alone, with |h|^2 from W_enc^T W_enc if `gram`."""
    g = active_gradient(layer, values, indices, d_values)
    qq, qg = (values * values).sum(1, keepdim=True), (values * g).sum(1, keepdim=True)
    none = qq == 0
    hh = torch.maximum(_squared_norms(layer, gram)[:, None], qq).masked_fill(none, 1)
    a = (qq / hh).sqrt()
    u = a * (g - (1 - a) * (qg / qq.masked_fill(none, 1)) * values)
    found = straight_through(u, layer.x, layer.W_enc, indices, needs)
    dx, dW, db = (layer.x.new_empty(0) if t is None else t for t in found)
    return dx, dW, db


def _squared_norms(layer: Layer, gram: bool) -> Tensor:
    """|h|^2 of each token [N]."""
    x, W_enc, b_enc, *_ = layer
    if gram:
        shift = W_enc.t() @ b_enc
        return vecdot(torch.addmm(shift, x, W_enc.t() @ W_enc), x) + x @ shift + b_enc @ b_enc
    parts = (torch.addmm(b_enc, x, W_enc.t()) for x in x.split(rows_at_a_time(x, len(W_enc))))
    return torch.cat([vecdot(h, h) for h in parts])


# --- the two algorithms of mode "dense" -----------------------------------------------------


def gram_is_cheaper(N: int, layer: Layer, mode: str, needs: Sequence[bool]) -> bool:
    """Whether the products of the weights take fewer FLOPs (formulas in rotation.py)."""
    (F, D), (need_x, need_W, _) = layer.W_enc.shape, needs
    if mode == "support":
        return (F + N) * D <= N * F
    both = D + layer.W_dec.shape[1]
    gram = 2 * (F + N) * D * both * (1 + need_W)
    return gram <= 2 * N * F * (both + D * (need_x + need_W))


def gram_backward(layer: Layer, code: Code, needs: Sequence[bool]) -> Gradients:
    """Gradients from W_enc^T W_enc and W_dec^T W_enc, without all pre-activations."""
    x, W_enc, b_enc, W_dec, d_recon = layer
    shift = W_enc.t() @ b_enc
    h_terms = torch.addmm(shift, x, W_enc.t() @ W_enc), shift, b_enc @ b_enc
    g_terms = d_recon @ (W_dec.t() @ W_enc), d_recon, W_dec.t() @ b_enc
    if use_triton(x) and x.numel():
        from ._rotation_kernel import launch_rotation

        a, p, u = launch_rotation(x, W_enc, h_terms, g_terms, code, needs[0])
    else:
        a, p, u = _rotate(x, W_enc, h_terms, g_terms, code, needs[0])
    dx = h_terms[0] if needs[0] else x.new_empty(0)
    del h_terms, g_terms
    return dx, *_gram_weights(layer, code, a, p, u, needs)


def _rotate(
    x: Tensor, W_enc: Tensor, h_terms: Terms, g_terms: Terms, code: Code, need_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients a, p, u; overwrites h W_enc, the first of the terms, with dx if needed."""
    (dx, shift, bb), (g_W, d_recon, shift_g) = h_terms, g_terms
    hh, hg = vecdot(dx, x) + x @ shift + bb, code.qt + vecdot(g_W, x) + d_recon @ shift_g
    a, p, u = _coefficients(code, hh, hg)
    if need_x:
        dx.mul_(p).addcmul_(g_W, a).add_(decode(u, code.indices, W_enc))
    return a, p, u


def _gram_weights(
    layer: Layer, code: Code, a: Tensor, p: Tensor, u: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """dW_enc and db_enc of the Gram algorithm, from the coefficients a, p, u."""
    x, W_enc, b_enc, W_dec, d_recon = layer
    _, need_W, need_b = needs
    dW, db = x.new_empty(0), x.new_empty(0)
    if not (need_W or need_b):
        return dW, db
    runs = latent_major(code.indices, len(W_enc), code.values != 0)
    weights = u.flatten()[runs.entry]
    if need_b:
        # Sums of one number per token, sequentially: in fp32 they would lose digits.
        db = sum_runs(weights, torch.ones_like(p, dtype=torch.float64), runs)[:, 0].to(x.dtype)
        db = torch.addmv(db, W_enc, (x.t() @ p)[:, 0]) + b_enc * p.sum()
        db.addmv_(W_dec, (d_recon.t() @ a)[:, 0])
    if need_W:
        dW = sum_runs(weights, x, runs)
        dW.addmm_(W_dec, d_recon.t() @ (a * x))
        dW.addmm_(W_enc, x.t() @ (p * x)).addr_(b_enc, (x.t() @ p)[:, 0])
    return dW, db


def dense_backward(layer: Layer, code: Code, needs: Sequence[bool]) -> Gradients:
    """Recompute h and g in chunks of tokens that fit in the pre-activation buffer."""
    x, W_enc, b_enc, _, d_recon = layer
    shapes = x.shape, W_enc.shape, b_enc.shape
    dx, dW, db = (x.new_zeros(s if need else 0) for s, need in zip(shapes, needs, strict=True))
    chunk = rows_at_a_time(x, 3 * len(W_enc))  # room for h, g and their product
    for start in range(0, len(x), chunk):
        rows = slice(start, min(start + chunk, len(x)))
        some = layer._replace(x=x[rows], d_recon=d_recon[rows])
        dh = _dh(some, Code(*(part[rows] for part in code)))
        if needs[0]:
            torch.mm(dh, W_enc, out=dx[rows])
        if needs[1]:
            dW.addmm_(dh.t(), x[rows])
        if needs[2]:
            db.add_(dh.sum(0))
    return dx, dW, db


def _dh(layer: Layer, code: Code) -> Tensor:
    """The gradient of h for a chunk of tokens: [n, F]"""
    x, W_enc, b_enc, W_dec, d_recon = layer
    h = torch.addmm(b_enc, x, W_enc.t())
    g = d_recon @ W_dec.t()
    a, p, u = _coefficients(code, vecdot(h, h), vecdot(h, g) + code.qt)
    return h.mul_(p).addcmul_(g, a).scatter_add_(1, code.indices, u)
