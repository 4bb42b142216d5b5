"""Three sparse products, whose gradients are again these three products.

    decode(v, i, W)         out[n]    = sum_k v[n, k] * W[i[n, k]]
    gather_dot(x, i, W)     out[n, k] = x[n] . W[i[n, k]]
    scatter_outer(v, i, x)  out[f]    = sum over (n, k) with i[n, k] = f of v[n, k] * x[n]

So there is one kernel per product and no backward kernel. An index outside [0, F) is a ValueError
on a CPU; on a GPU, where checking would have to wait, it stands for a row of zeros.
Shapes: N tokens, K active latents per token, F latents, D model width. Accumulation is in fp32
(fp64 for fp64 inputs), in a fixed order: the same inputs give the same bits.
"""

import warnings

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from ._launch import check_codes, check_devices, check_indices, check_shape, use_triton
from ._op import register
from .latent_major import latent_major_once, sum_runs

# --- reference: the specification -----------------------------------------------------------


def decode_reference(values: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    """[N, K], [N, K], [F, D] -> [N, D]"""
    return torch.einsum("nk,nkd->nd", values, W[indices])


def gather_dot_reference(x: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    """[N, D], [N, K], [F, D] -> [N, K]"""
    return torch.einsum("nd,nkd->nk", x, W[indices])


def scatter_outer_reference(values: Tensor, indices: Tensor, x: Tensor, F: int) -> Tensor:
    """[N, K], [N, K], [N, D] -> [F, D]"""
    outer = torch.einsum("nk,nd->nkd", values, x)
    return outer.new_zeros(F, x.shape[1]).index_add(0, indices.flatten(), outer.flatten(0, 1))


# --- torch path: what runs without a GPU ----------------------------------------------------


def _decode_torch(values: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    return embedding_bag(indices, W, per_sample_weights=values.to(W.dtype), mode="sum")


def _gather_dot_torch(x: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    (N, K), F = indices.shape, W.shape[0]
    wide = torch.promote_types(torch.promote_types(x.dtype, W.dtype), torch.float32)
    # sampled_addmm supports neither mixed dtypes, half precision nor empty indices, and no more
    # entries than a dense matrix has.
    if not x.dtype == W.dtype == wide or K > F or not indices.numel():
        rows = zip(x.to(wide).split(64), indices.split(64), strict=True)
        return torch.cat([(W[i].to(wide) @ t[:, :, None])[:, :, 0] for t, i in rows]).to(x)
    start = torch.arange(0, N * K + 1, K, dtype=indices.dtype)
    return ragged_dots(x, start, indices.flatten(), W).view(N, K)


def ragged_dots(x: Tensor, start: Tensor, latents: Tensor, W: Tensor) -> Tensor:
    """Dot products of token n with the rows latents[start[n] : start[n + 1]] of W, distinct, on a
    CPU: contiguous [N, D], [N + 1], [M], [F, D], of one wide dtype -> [M]. M must not be 0."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        pattern = torch.sparse_csr_tensor(
            start, latents, x.new_zeros(len(latents)), (len(x), len(W)), check_invariants=False
        )
    return torch.sparse.sampled_addmm(pattern, x, W.t(), beta=0.0).values()


# --- autograd -------------------------------------------------------------------------------


class _Product(torch.autograd.Function):
    """What the three products have in common: backward needs their three tensors."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:3])


class _Decode(_Product):
    @staticmethod
    def forward(values: Tensor, indices: Tensor, W: Tensor) -> Tensor:
        check_indices(indices, W.shape[0])
        if not indices.numel():
            return W.new_zeros(indices.shape[0], W.shape[1])
        if use_triton(W):
            from ._sparse_kernel import launch_decode as run
        else:
            run = _decode_torch
        return run(values.contiguous(), indices.contiguous(), W.contiguous())

    @staticmethod
    def backward(ctx, g):  # g: [N, D]
        values, indices, W = ctx.saved_tensors
        need_values, _, need_W = ctx.needs_input_grad
        return (
            gather_dot(g, indices, W).to(values.dtype) if need_values else None,
            None,
            scatter_outer(values, indices, g, W.shape[0]) if need_W else None,
        )


class _GatherDot(_Product):
    @staticmethod
    def forward(x: Tensor, indices: Tensor, W: Tensor) -> Tensor:
        check_indices(indices, W.shape[0])
        if use_triton(W):
            from ._sparse_kernel import launch_gather_dot as run
        else:
            run = _gather_dot_torch
        return run(x.contiguous(), indices.contiguous(), W.contiguous())

    @staticmethod
    def backward(ctx, g):  # g: [N, K]
        x, indices, W = ctx.saved_tensors
        need_x, _, need_W = ctx.needs_input_grad
        return (
            decode(g, indices, W) if need_x else None,
            None,
            scatter_outer(g, indices, x, W.shape[0]) if need_W else None,
        )


class _ScatterOuter(_Product):
    @staticmethod
    def forward(values: Tensor, indices: Tensor, x: Tensor, F: int) -> Tensor:
        check_indices(indices, F)
        if not indices.numel():
            return x.new_zeros(F, x.shape[1])
        runs = latent_major_once(indices, F)
        weights = values.flatten()[runs.entry].to(x.dtype)
        return sum_runs(weights, x.contiguous(), runs)

    @staticmethod
    def backward(ctx, g):  # g: [F, D]
        values, indices, x = ctx.saved_tensors
        need_values, _, need_x, _ = ctx.needs_input_grad
        return (
            gather_dot(x, indices, g).to(values.dtype) if need_values else None,
            None,
            decode(values, indices, g) if need_x else None,
            None,
        )


_decode = register(_Decode, lambda values, indices, W: W.new_empty(indices.shape[0], W.shape[1]))
_gather_dot = register(_GatherDot, lambda x, indices, W: x.new_empty(indices.shape))
_scatter_outer = register(_ScatterOuter, lambda values, indices, x, F: x.new_empty(F, x.shape[1]))

# --- public ---------------------------------------------------------------------------------


def decode(values: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    """Reconstruct tokens: sum the rows of W that each token picks, weighted by its values.

    values [N, K] and W [F, D] floating, indices [N, K] int32 or int64 below F (repeats add up)
    -> [N, D] in W's dtype. Differentiable in values and W, twice and more.
    Moves N K D elements of W and costs 2 N K D FLOPs. ValueError for wrong shapes or dtypes.
    """
    check_shape("W", W, None, None)
    check_codes(values, indices)
    check_devices(values=values, indices=indices, W=W)
    return _decode(values, indices, W)


def gather_dot(x: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    """Dot product of each token with the rows of W that it picks.

    x [N, D] and W [F, D] floating, indices [N, K] int32 or int64 below F -> [N, K] in x's dtype.
    Differentiable in x and W, twice and more. Moves N K D elements of W and costs 2 N K D FLOPs.
    ValueError for wrong shapes or dtypes.
    """
    check_shape("W", W, None, None)
    check_codes(None, indices)
    check_shape("x", x, indices.shape[0], W.shape[1])
    check_devices(x=x, indices=indices, W=W)
    return _gather_dot(x, indices, W)


def scatter_outer(values: Tensor, indices: Tensor, x: Tensor, F: int) -> Tensor:
    """Sum, for each of F latents, the tokens that pick it, weighted by their values.

    values [N, K] and x [N, D] floating, indices [N, K] int32 or int64 below F -> [F, D] in x's
    dtype: the weight gradient of decode. Differentiable in values and x, twice and more.
    Sorts N K indices, moves N K D elements of x. ValueError for wrong shapes or dtypes.
    """
    check_codes(values, indices)
    check_shape("x", x, indices.shape[0], None)
    check_devices(values=values, indices=indices, x=x)
    return _scatter_outer(values, indices, x, F)
