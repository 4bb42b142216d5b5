"""The rotation trick: a gradient of top-k that is turned and scaled as top-k turned and scaled h.

In the forward pass q is the k largest of h = x W_enc^T + b_enc (topk.py) and recon = q W_dec. The
backward pass treats q as lambda R h, where lambda = |q| / |h| and R, the rotation that takes the
direction of h to that of q, are constants (arXiv:2410.06424). Since q . h = |q|^2, the cosine of
their angle is lambda, and with g = dL/dq

    dh = lambda R^T g = a g + b h / |h| + c q / |q|
    s = (h . g / |h| + q . g / |q|) / (1 + lambda)
    a = lambda,  b = lambda (2 q . g / |q| - s),  c = -lambda s         all 0 where q = 0

    mode "dense"      g = W_dec d_recon + d_values: all latents get gradients
    mode "support"    dh of the active latents alone, from their own g

An entry of value 0 is inactive: it is not part of q, and its d_values are ignored.

Mode "support" (our choice). On the active latents h is q, and s = q . g / |q|, so that

    dh = lambda (g - (1 - lambda) (q . g / |q|^2) q)    on active latents, 0 elsewhere

With g restricted to them, the formula gives the others b h / |h|. That term is left out: summed
over tokens it is W_enc (x^T p x), which pulls every encoder row to the data's leading components
whatever the error, and under Adam it diverges. What is left costs encode_topk's backward and

    |h|^2 = x . G x + 2 x . W_enc^T b_enc + |b_enc|^2                   G = W_enc^T W_enc

which takes 2 (F + N) D^2 FLOPs, or 2 N F D from h itself; the cheaper one runs.

Mode "dense". Write g = W_dec d_recon + t with t sparse, p = b / |h| (a number per token) and
u = c q / |q| + a t (sparse). Then

    h . g  = d_recon . C x + d_recon . W_dec^T b_enc + q . t            C = W_dec^T W_enc
    dx     = a C^T d_recon + p (G x + W_enc^T b_enc) + decode(u, W_enc)
    dW_enc = W_dec (d_recon^T a x) + W_enc (x^T p x) + b_enc (sum p x) + scatter_outer(u, x)
    db_enc = W_dec (sum a d_recon) + W_enc (sum p x) + b_enc (sum p) + sum u

This is the Gram algorithm. The dense one recomputes h and g for a chunk of tokens at a time. They
cost

    Gram    2 (F + N) D (D + D_out), twice that with dW_enc                             FLOPs
    dense   2 N F (D + D_out), and 2 N F D for each of dx and dW_enc                    FLOPs

and the cheaper one runs: Gram once N exceeds about D. With G, |h|^2 loses digits where |h| is much
smaller than |W_enc| |x| or |b_enc|; |h| is therefore clamped to at least |q|.
Shapes: N tokens, K kept, F latents, D and D_out widths of x and of recon.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from ._launch import wide_dtype
from ._op import register_constant
from ._rotation_backward import (
    Layer,
    code_of,
    dense_backward,
    gram_backward,
    gram_is_cheaper,
    support_backward,
)

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
    x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, values: Tensor, indices: Tensor,
    d_recon: Tensor, d_values: Tensor, mode: Mode,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> dx [N, D], dW_enc [F, D], db_enc [F]"""
    h = linear(x, W_enc, b_enc)
    q, g = (torch.zeros_like(h).scatter(1, indices, t) for t in (values, d_values))
    active = q != 0
    g = g * active + d_recon @ W_dec.t()
    dh = rotation_gradient_reference(h, q, g * active if mode == "support" else g)
    if mode == "support":
        dh = dh * active
    return dh @ W_enc, dh.t() @ x, dh.sum(0)


# --- op -------------------------------------------------------------------------------------


def _fake(x, W_enc, b_enc, W_dec, values, indices, d_recon, d_values, mode, needs):
    inputs = zip((x, W_enc, b_enc), needs, strict=True)
    return tuple(t.new_empty(t.shape if need else 0) for t, need in inputs)


@partial(register_constant, fake=_fake)
def rotation_gradients(
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
    """Gradients of a top-k encoder with the rotation trick; encode_decode checks the arguments.

    Args:
        x, W_enc, b_enc, W_dec: [N, D] (centered), [F, D], [F], [F, D_out]
        values, indices: the code of the forward pass, [N, K] each
        d_recon, d_values: the gradients of recon [N, D_out] and of values [N, K]
        mode: "support" rotates within the active latents, "dense" reaches all latents
        needs: which of dx, dW_enc and db_enc to compute; the others are returned empty

    Costs 4 (F + N) D (D + D_out) FLOPs or 2 N F (3 D + D_out), the smaller, in mode "dense", and
    2 (F + N) D^2 or 2 N F D in mode "support" (see the module), and moves 3 N K D elements of the
    weights. Allocates a few [N, D] tensors, or FASTSAE_BUFFER_MB of pre-activations; half precision
    is copied to float32. Not differentiable again. Deterministic.
    """
    inputs = x, W_enc, b_enc, W_dec, values, d_recon, d_values
    X, W, b, V, v, d, dv = (t.to(wide_dtype(x)).contiguous() for t in inputs)
    layer, i = Layer(X, W, b, V, d), indices.long().contiguous()
    gram = gram_is_cheaper(len(x), layer, mode, needs)
    if mode == "support":
        dx, dW_enc, db_enc = support_backward(layer, v, i, dv, needs, gram)
    else:
        backward = gram_backward if gram else dense_backward
        dx, dW_enc, db_enc = backward(layer, code_of(layer, v, i, dv), needs)
    return dx.to(x.dtype), dW_enc.to(W_enc.dtype), db_enc.to(b_enc.dtype)
