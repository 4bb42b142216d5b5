"""Three products of a sparse code with a dense matrix, closed under differentiation.

    decode(v, i, W)         out[n]    = sum_k v[n, k] * W[i[n, k]]
    gather_dot(x, i, W)     out[n, k] = x[n] . W[i[n, k]]
    scatter_outer(v, i, x)  out[f]    = sum over (n, k) with i[n, k] = f of v[n, k] * x[n]

The gradient of each is the other two, so there is one kernel per product and no backward kernel.
Shapes: N tokens, K active latents per token, F latents, D model width. Accumulation is in fp32
(fp64 for fp64 inputs), in a fixed order: the same inputs give the same bits.
"""

import warnings
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import embedding_bag

from ._launch import check_codes, check_matrix, power_of_2, use_triton

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


# --- the same entries, latent by latent -----------------------------------------------------


class LatentMajor(NamedTuple):
    """The N * K entries of a code in latent order, each latent's in token order."""

    entry: Tensor
    """int64 [N * K]: where the entry stood in the flattened [N, K] code."""

    token: Tensor
    """int32 [N * K]: the token it belongs to."""

    start: Tensor
    """int32 [F + 1]: latent f owns entries start[f] up to start[f + 1]."""


def latent_major(indices: Tensor, F: int) -> LatentMajor:
    """Sort the entries of a code by latent, stably: [N, K] -> LatentMajor."""
    latent, entry = indices.flatten().int().sort(stable=True)  # int32 sorts in half the time
    each = torch.arange(F + 1, device=latent.device, dtype=torch.int32)
    start = torch.searchsorted(latent, each, out_int32=True)
    return LatentMajor(entry, (entry // max(indices.shape[1], 1)).int(), start)


# --- torch path: what runs without a GPU ----------------------------------------------------


def _decode_torch(values: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    return embedding_bag(indices, W, per_sample_weights=values.to(W.dtype), mode="sum")


def _gather_dot_torch(x: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    (N, K), F = indices.shape, W.shape[0]
    wide = torch.promote_types(torch.promote_types(x.dtype, W.dtype), torch.float32)
    # sampled_addmm knows one dtype, no half precision, and no more entries than a dense matrix has.
    if not x.dtype == W.dtype == wide or K > F:
        rows = zip(x.to(wide).split(64), indices.split(64), strict=True)
        return torch.cat([(W[i].to(wide) @ t[:, :, None])[:, :, 0] for t, i in rows]).to(x)
    start = torch.arange(0, N * K + 1, K, dtype=indices.dtype)
    zeros = x.new_zeros(N * K)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        pattern = torch.sparse_csr_tensor(
            start, indices.flatten(), zeros, (N, F), check_invariants=False
        )
    return torch.sparse.sampled_addmm(pattern, x, W.t(), beta=0.0).values().view(N, K)


def _sum_runs_torch(weights: Tensor, x: Tensor, runs: LatentMajor, first: int, last: int) -> Tensor:
    low, high = int(runs.start[first]), int(runs.start[last])
    offsets = runs.start[first:last] - low
    return embedding_bag(
        runs.token[low:high], x, offsets, per_sample_weights=weights[low:high], mode="sum"
    )


# --- kernels: all tensors row-major ---------------------------------------------------------


@triton.jit
def _decode_kernel(
    v_ptr, i_ptr, W_ptr, out_ptr, D, K: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr
):
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_D,), dtype=ACC)
    for k in range(K):
        f = tl.load(i_ptr + n * K + k).to(tl.int64)
        v = tl.load(v_ptr + n * K + k).to(ACC)
        acc += v * tl.load(W_ptr + f * D + d, mask=d < D, other=0.0).to(ACC)
    tl.store(out_ptr + n * D + d, acc, mask=d < D)


@triton.jit
def _gather_dot_kernel(
    x_ptr, i_ptr, W_ptr, out_ptr, D, K: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr
):
    n = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1)
    f = tl.load(i_ptr + n * K + k).to(tl.int64)
    acc = tl.zeros((BLOCK_D,), dtype=ACC)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + n * D + d, mask=d < D, other=0.0).to(ACC)
        acc += x * tl.load(W_ptr + f * D + d, mask=d < D, other=0.0).to(ACC)
    tl.store(out_ptr + n * K + k, tl.sum(acc))


@triton.jit
def _sum_runs_kernel(
    w_ptr, token_ptr, start_ptr, x_ptr, out_ptr, first, D,
    BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_D,), dtype=ACC)
    f = first + row
    for run in range(tl.load(start_ptr + f), tl.load(start_ptr + f + 1)):
        v = tl.load(w_ptr + run).to(ACC)
        n = tl.load(token_ptr + run).to(tl.int64)
        acc += v * tl.load(x_ptr + n * D + d, mask=d < D, other=0.0).to(ACC)
    tl.store(out_ptr + row * D + d, acc, mask=d < D)


# --- launchers ------------------------------------------------------------------------------


def _constants(x: Tensor) -> tuple[int, tl.dtype]:
    """Columns of x per program, and the dtype to accumulate in."""
    return min(1024, power_of_2(x.shape[1])), tl.float64 if x.dtype == torch.float64 else tl.float32


def _launch_decode(values: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    (N, K), D = indices.shape, W.shape[1]
    out = W.new_empty(N, D)
    BLOCK_D, ACC = _constants(W)
    _decode_kernel[(N, -(-D // BLOCK_D))](values, indices, W, out, D, K, BLOCK_D, ACC)
    return out


def _launch_gather_dot(x: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    (N, K), D = indices.shape, W.shape[1]
    out = x.new_empty(N, K)
    _gather_dot_kernel[(N, K)](x, indices, W, out, D, K, *_constants(x))
    return out


def _launch_sum_runs(
    weights: Tensor, x: Tensor, runs: LatentMajor, first: int, last: int
) -> Tensor:
    D = x.shape[1]
    out = x.new_empty(last - first, D)
    BLOCK_D, ACC = _constants(x)
    grid = (last - first, -(-D // BLOCK_D))
    _sum_runs_kernel[grid](weights, runs.token, runs.start, x, out, first, D, BLOCK_D, ACC)
    return out


# --- autograd -------------------------------------------------------------------------------


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, indices, W):
        ctx.save_for_backward(values, indices, W)
        if not indices.numel():
            return W.new_zeros(indices.shape[0], W.shape[1])
        run = _launch_decode if use_triton(W) else _decode_torch
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


class _GatherDot(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, indices, W):
        ctx.save_for_backward(x, indices, W)
        if not indices.numel():
            return x.new_zeros(indices.shape)
        run = _launch_gather_dot if use_triton(W) else _gather_dot_torch
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


class _ScatterOuter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, indices, x, F):
        ctx.save_for_backward(values, indices, x)
        values, indices, x = values.contiguous(), indices.contiguous(), x.contiguous()
        if not indices.numel():
            return x.new_zeros(F, x.shape[1])
        runs = latent_major(indices, F)
        return sum_runs(values.flatten()[runs.entry].to(x.dtype), x, runs, 0, F)

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


# --- public ---------------------------------------------------------------------------------


def sum_runs(weights: Tensor, x: Tensor, runs: LatentMajor, first: int, last: int) -> Tensor:
    """Rows first to last of scatter_outer, for a caller that keeps the entries in latent order.

    weights [N * K] = values.flatten()[runs.entry] in x's dtype, x [N, D] -> [last - first, D].
    Not differentiable. On a CPU, a block of rows at a time stays in the cache.
    """
    run = _launch_sum_runs if use_triton(x) else _sum_runs_torch
    return run(weights, x, runs, first, last)


def decode(values: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    """Sum the rows of W that each token picks, weighted by its values.

    values [N, K] and W [F, D] floating, indices [N, K] int32 or int64 below F (repeats add up)
    -> [N, D] in W's dtype. Differentiable in values and W, twice and more.
    Moves N K D elements of W and costs 2 N K D FLOPs. ValueError for wrong shapes or dtypes.
    """
    check_matrix("W", W)
    check_codes(values, indices, W.shape[0])
    return _Decode.apply(values, indices, W)


def gather_dot(x: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    """Dot product of each token with the rows of W that it picks.

    x [N, D] and W [F, D] floating, indices [N, K] int32 or int64 below F -> [N, K] in x's dtype.
    Differentiable in x and W, twice and more. Moves N K D elements of W and costs 2 N K D FLOPs.
    ValueError for wrong shapes or dtypes.
    """
    check_matrix("W", W)
    check_codes(None, indices, W.shape[0])
    check_matrix("x", x, indices.shape[0], W.shape[1])
    return _GatherDot.apply(x, indices, W)


def scatter_outer(values: Tensor, indices: Tensor, x: Tensor, F: int) -> Tensor:
    """Sum, for each of F latents, the tokens that picked it, weighted by their values.

    values [N, K] and x [N, D] floating, indices [N, K] int32 or int64 below F -> [F, D] in x's
    dtype: the weight gradient of decode. Differentiable in values and x, twice and more.
    Sorts N K indices, moves N K D elements of x. ValueError for wrong shapes or dtypes.
    """
    check_codes(values, indices, F)
    check_matrix("x", x, rows=indices.shape[0])
    return _ScatterOuter.apply(values, indices, x, F)
