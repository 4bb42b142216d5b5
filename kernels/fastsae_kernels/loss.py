"""Decode, subtract the target, square, and find the gradient of the values, in one pass.

    error[n]  = sum_k v[n, k] W[i[n, k]] + b - target[n]
    sse[n]    = |error[n]|^2
    dots[n,k] = error[n] . W[i[n, k]]          half the gradient of sse[n] in v[n, k]

The rows of W that a token picks are needed twice, to decode and for the dot products. They stay in
registers while they fit (64 KB), and are read again from the L2 cache otherwise.
Shapes: N tokens, K active latents per token, F latents, D width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import (
    check_codes,
    check_devices,
    check_indices,
    check_matrix,
    launch,
    power_of_2,
    use_triton,
)
from ._op import register
from .latent_major import constants_for, load_rows
from .sparse import (
    decode,
    decode_reference,
    gather_dot,
    gather_dot_reference,
    load_latents,
    scatter_outer,
)

# --- reference: the specification -----------------------------------------------------------


def squared_error_reference(
    values: Tensor, indices: Tensor, W: Tensor, b: Tensor, target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """[N, K], [N, K], [F, D], [D], [N, D] -> [N], [N, D], [N, K]"""
    error = decode_reference(values, indices, W) + b - target
    constant = error.detach()
    return error.square().sum(1), constant, gather_dot_reference(constant, indices, W.detach())


# --- torch path: what runs without a GPU ----------------------------------------------------


def _squared_error_torch(
    values: Tensor, indices: Tensor, W: Tensor, b: Tensor, target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(W.dtype, torch.float32)
    error = decode(values, indices, W.to(wide)).add_(b).sub_(target)
    sse = torch.linalg.vecdot(error, error)
    return sse, error.to(W.dtype), gather_dot(error, indices, W)


# --- kernel: all tensors row-major ----------------------------------------------------------


@triton.jit
def _squared_error_kernel(
    v_ptr, i_ptr, W_ptr, b_ptr, target_ptr, sse_ptr, error_ptr, dots_ptr, F, K, D,
    RESIDENT: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    error = tl.load(b_ptr + d, mask=d < D, other=0.0).to(ACC)
    error -= tl.load(target_ptr + n * D + d, mask=d < D, other=0.0).to(ACC)
    if RESIDENT:
        k = tl.arange(0, BLOCK_K)
        f, exists = load_latents(i_ptr + n * K, k, K, F)  # pyright: ignore
        v = tl.load(v_ptr + n * K + k, mask=k < K, other=0.0).to(ACC)
        rows = load_rows(W_ptr, f, exists, d, D)
        error += tl.sum(v[:, None] * rows.to(ACC), axis=0)
        dots = tl.sum(rows.to(ACC) * error[None, :], axis=1)
        tl.store(dots_ptr + n * K + k, dots, mask=k < K)
    else:
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            f, exists = load_latents(i_ptr + n * K, k, K, F)  # pyright: ignore
            v = tl.load(v_ptr + n * K + k, mask=k < K, other=0.0).to(ACC)
            error += tl.sum(v[:, None] * load_rows(W_ptr, f, exists, d, D).to(ACC), axis=0)
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            f, exists = load_latents(i_ptr + n * K, k, K, F)  # pyright: ignore
            rows = load_rows(W_ptr, f, exists, d, D).to(ACC)
            tl.store(dots_ptr + n * K + k, tl.sum(rows * error[None, :], axis=1), mask=k < K)
    tl.store(sse_ptr + n, tl.sum(error * error))
    tl.store(error_ptr + n * D + d, error, mask=d < D)


# --- launcher -------------------------------------------------------------------------------

WIDEST = 8192
"""The largest D of the kernel: a token's error stays in registers."""


def _launch_squared_error(
    values: Tensor, indices: Tensor, W: Tensor, b: Tensor, target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    (N, K), (F, D) = indices.shape, W.shape
    wide = torch.promote_types(W.dtype, torch.float32)
    sse, dots = W.new_empty(N, dtype=wide), W.new_empty(N, K, dtype=wide)
    error = W.new_empty(N, D)
    block_k, _, acc = constants_for(W)
    width = power_of_2(D)
    rows = power_of_2(K) * width * W.element_size()
    resident = rows <= 64 << 10
    launch(
        _squared_error_kernel,
        (N,),
        *(values, indices, W, b, target, sse, error, dots, F, K, D),
        *(resident, power_of_2(K) if resident else block_k, width, acc),
        num_warps=min(16, max(1, rows // 4096 if resident else width // 256)),
    )
    return sse, error, dots


# --- autograd -------------------------------------------------------------------------------


class _SquaredError(torch.autograd.Function):
    @staticmethod
    def forward(
        values: Tensor, indices: Tensor, W: Tensor, b: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        check_indices(indices, W.shape[0])
        inputs = [t.contiguous() for t in (values, indices, W, b, target)]
        kernel = use_triton(W) and W.shape[1] <= WIDEST and indices.numel()
        return (_launch_squared_error if kernel else _squared_error_torch)(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, error, dots = output
        ctx.save_for_backward(*inputs, error, dots)
        ctx.mark_non_differentiable(error, dots)

    @staticmethod
    def backward(ctx, g, *_):  # g: [N]
        values, indices, W, b, target, error, dots = ctx.saved_tensors
        need_values, _, need_W, need_b, need_target = ctx.needs_input_grad
        if torch.is_grad_enabled():  # to be differentiated again: what was found is no constant
            wide = decode(values, indices, W.to(dots.dtype)) + b - target
            error, dots = wide.to(W.dtype), gather_dot(wide, indices, W)
        g = 2 * g[:, None]
        d_recon = (g * error) if need_b or need_target else error
        return (
            (g * dots).to(values.dtype) if need_values else None,
            None,
            scatter_outer(g * values, indices, error, W.shape[0]) if need_W else None,
            d_recon.sum(0).to(b.dtype) if need_b else None,
            d_recon.neg().to(target.dtype) if need_target else None,
        )


def _fake(values, indices, W, b, target):
    wide = torch.promote_types(W.dtype, torch.float32)
    N, K = indices.shape
    sse, dots = W.new_empty(N, dtype=wide), W.new_empty(N, K, dtype=wide)
    return sse, W.new_empty(N, W.shape[1]), dots


_squared_error = register(_SquaredError, _fake)


# --- public ---------------------------------------------------------------------------------


def squared_error(
    values: Tensor, indices: Tensor, W: Tensor, b: Tensor, target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """How far the reconstruction of each token is from its target.

    values [N, K], W [F, D], b [D], target [N, D] floating, indices [N, K] int32 or int64 below F
    -> sse [N], error [N, D] in W's dtype and dots [N, K]; sse and dots in fp32 (fp64 for fp64 W).
    sse is differentiable in values, W, b and target, twice and more; error and dots are constants.
    The forward pass already finds the gradient of values, so backward only sums weight gradients;
    if that is to be differentiated again, it decodes again.

    Moves N K D elements of W and 2 N D more, costs 4 N K D FLOPs. ValueError for wrong shapes or
    dtypes.
    """
    check_matrix("W", W)
    check_codes(values, indices)
    check_matrix("target", target, indices.shape[0], W.shape[1])
    if b.shape != W.shape[1:] or not b.is_floating_point():
        raise ValueError(
            f"b must be floating point of shape {[W.shape[1]]}, got {b.dtype} of {list(b.shape)}"
        )
    check_devices(values=values, indices=indices, W=W, b=b, target=target)
    return _squared_error(values, indices, W, b, target)
