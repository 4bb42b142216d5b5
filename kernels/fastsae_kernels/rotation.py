"""Gradient of top-k by the rotation trick, without a tensor of all pre-activations.

Forward, q is the k largest of h = x W_enc^T + b_enc (topk.py) and recon = q W_dec. Backward
pretends that q = lambda R h, with lambda = |q| / |h| and R the rotation that takes h to q, both
constant (arXiv:2410.06424). As q . h = |q|^2, the cosine of their angle is lambda, and

    dh = lambda R^T g = a g + b h / |h| + c q / |q|                     g = dL/dq
    s = (h . g / |h| + q . g / |q|) / (1 + lambda)
    a = lambda,  b = lambda (2 q . g / |q| - s),  c = -lambda s         all 0 where q = 0

    mode "dense"      g = W_dec d_recon + d_values: latents that are not kept get gradients too
    mode "support"    the same on the active entries of q, 0 elsewhere

An entry of value 0 is inactive: it is no part of q, and its d_values count for nothing. With
g = W_dec d_recon + t in mode "dense" and g = t in mode "support", t sparse, and p = b / |h|,
u = c q / |q| + a t, both sparse or one number per token:

    |h|^2  = x . G x + 2 x . W_enc^T b_enc + |b_enc|^2                  G = W_enc^T W_enc
    h . g  = d_recon . C x + d_recon . W_dec^T b_enc + q . t            C = W_dec^T W_enc
    dx     = a C^T d_recon + p (G x + W_enc^T b_enc) + decode(u, W_enc)
    dW_enc = W_dec (d_recon^T a x) + W_enc (x^T p x) + b_enc (sum p x) + scatter_outer(u, x)
    db_enc = W_dec (sum a d_recon) + W_enc (sum p x) + b_enc (sum p) + sum u

without the terms of C and W_dec in mode "support". This is the Gram way. The other computes h and
g for some tokens at a time. With E = D_out in mode "dense" and 0 in mode "support" they cost

    Gram    2 (F + N) D (D + E), twice that with dW_enc                                 FLOPs
    dense   2 N F (D + E), and 2 N F D for each of dx and dW_enc                        FLOPs

and the cheaper is taken: Gram where N is above about D. The Gram way loses digits of |h|^2 where
|h| is much smaller than |W_enc| |x| or |b_enc|, but never takes |h| to be smaller than |q|.
Shapes: N tokens, K kept, F latents, D and D_out widths of x and of recon.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from ._launch import check_codes, check_devices, check_matrix
from ._op import register_constant
from ._rotation_backward import Layer, code_of, dense_backward, gram_backward, gram_is_cheaper

Mode = Literal["support", "dense"]

# --- reference: the specification -----------------------------------------------------------


def rotation_reference(h: Tensor, q: Tensor) -> Tensor:
    """lambda R of each token, 0 where h or q is: [N, F], [N, F] -> [N, F, F]"""
    h_norm, q_norm = h.norm(dim=1, keepdim=True), q.norm(dim=1, keepdim=True)
    none = (h_norm == 0) | (q_norm == 0)
    h_hat, q_hat = h / h_norm.masked_fill(none, 1), q / q_norm.masked_fill(none, 1)
    r = h_hat + q_hat
    r = r / r.norm(dim=1, keepdim=True).masked_fill(none, 1)
    outer = torch.einsum("ni,nj->nij", q_hat, h_hat) - torch.einsum("ni,nj->nij", r, r)
    R = torch.eye(h.shape[1]).to(h) + 2 * outer
    return (q_norm / h_norm.masked_fill(none, 1))[:, :, None] * R


def rotation_gradient_reference(h: Tensor, q: Tensor, g: Tensor) -> Tensor:
    """lambda R^T g: [N, F], [N, F], [N, F] -> [N, F]"""
    return torch.einsum("nij,ni->nj", rotation_reference(h, q), g)


def rotation_gradients_reference(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    values: Tensor,
    indices: Tensor,
    d_recon: Tensor,
    d_values: Tensor,
    mode: Mode,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dx [N, D], dW_enc [F, D], db_enc [F]"""
    h = linear(x, W_enc, b_enc)
    q, g = (torch.zeros_like(h).scatter(1, indices, t) for t in (values, d_values))
    g = g * (q != 0) + d_recon @ W_dec.t()
    if mode == "support":
        g = g * (q != 0)
    dh = rotation_gradient_reference(h, q, g)
    return dh @ W_enc, dh.t() @ x, dh.sum(0)


# --- op -------------------------------------------------------------------------------------


def _rotation_gradients(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    values: Tensor,
    indices: Tensor,
    d_recon: Tensor,
    d_values: Tensor,
    mode: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """What is not needed is returned empty."""
    inputs = x, W_enc, b_enc, W_dec, values, d_recon, d_values
    wide = torch.promote_types(x.dtype, torch.float32)
    X, W, b, V, v, d, dv = (t.to(wide).contiguous() for t in inputs)
    layer = Layer(X, W, b, V if mode == "dense" else None, d)
    code = code_of(layer, V, v, indices.long().contiguous(), dv)
    backward = gram_backward if gram_is_cheaper(len(x), layer, needs) else dense_backward
    dx, dW_enc, db_enc = backward(layer, code, needs)
    return dx.to(x.dtype), dW_enc.to(W_enc.dtype), db_enc.to(b_enc.dtype)


def _fake(x, W_enc, b_enc, W_dec, values, indices, d_recon, d_values, mode, needs):
    inputs = zip((x, W_enc, b_enc), needs, strict=True)
    return tuple(t.new_empty(t.shape if need else 0) for t, need in inputs)


_rotation_gradients_op = register_constant(_rotation_gradients, _fake)


# --- public ---------------------------------------------------------------------------------


def rotation_gradients(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    values: Tensor,
    indices: Tensor,
    d_recon: Tensor,
    d_values: Tensor | None,
    mode: Mode,
    needs: Sequence[bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of an encoder with top-k by the rotation trick (arXiv:2410.06424).

    x [N, D] (centered), W_enc [F, D], b_enc [F], W_dec [F, D_out], the code that the forward pass
    kept, values and indices [N, K], and the loss's gradients in recon, d_recon [N, D_out], and
    in values, d_values [N, K] or None -> dx, dW_enc, db_enc in the dtypes of x, W_enc, b_enc; None
    for those that `needs` does not ask for. mode "dense" gives every latent a gradient, "support"
    spreads only that of active ones. Not differentiable again. Deterministic.

    Costs 4 (F + N) D (D + D_out) FLOPs or 2 N F (3 D + D_out), the smaller, in mode "dense" (see
    the module), and moves 3 N K D elements of the weights. Beside the results there are a few
    [N, D], or FASTSAE_BUFFER_MB of pre-activations; half precision is copied to float32.
    ValueError for wrong shapes, dtypes or mode.
    """
    if mode not in ("support", "dense"):
        raise ValueError(f'mode must be "support" or "dense", got {mode!r}')
    check_codes(values, indices)
    check_matrix("x", x, rows=indices.shape[0])
    check_matrix("W_enc", W_enc, columns=x.shape[1])
    check_matrix("W_dec", W_dec, rows=W_enc.shape[0])
    check_matrix("d_recon", d_recon, x.shape[0], W_dec.shape[1])
    d_values = torch.zeros_like(values) if d_values is None else d_values
    for name, t, like in (("b_enc", b_enc, W_enc[:, 0]), ("d_values", d_values, values)):
        if t.shape != like.shape:
            raise ValueError(f"{name} must have shape {list(like.shape)}, got {list(t.shape)}")
    arguments = x, W_enc, b_enc, W_dec, values, indices, d_recon, d_values
    names = "x", "W_enc", "b_enc", "W_dec", "values", "indices", "d_recon", "d_values"
    check_devices(**dict(zip(names, arguments, strict=True)))
    dx, dW_enc, db_enc = _rotation_gradients_op(*arguments, mode, needs)
    need_x, need_W, need_b = needs
    return dx if need_x else None, dW_enc if need_W else None, db_enc if need_b else None
