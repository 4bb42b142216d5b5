"""The squared error of a reconstruction and the gradient of its values, in one pass.

    error[n]  = sum_k v[n, k] W[i[n, k]] + b - target[n]
    sse[n]    = |error[n]|^2
    dots[n,k] = error[n] . W[i[n, k]]          half the gradient of sse[n] in v[n, k]

Decoding and the dot products need the same rows of W; the kernel (_loss_kernel.py) reads them once.
Shapes: N tokens, K active latents per token, F latents, D width.
"""

import torch
from torch import Tensor

from ._launch import check_codes, check_devices, check_indices, check_shape, use_triton, wide_dtype
from ._op import register
from .sparse import decode, decode_reference, gather_dot, gather_dot_reference, scatter_outer

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
    wide = wide_dtype(W)
    error = decode(values, indices, W.to(wide)).add_(b).sub_(target)
    sse = torch.linalg.vecdot(error, error)
    return sse, error.to(W.dtype), gather_dot(error, indices, W)


# --- autograd -------------------------------------------------------------------------------


class _SquaredError(torch.autograd.Function):
    @staticmethod
    def forward(
        values: Tensor, indices: Tensor, W: Tensor, b: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        check_indices(indices, W.shape[0])
        inputs = [t.contiguous() for t in (values, indices, W, b, target)]
        if not (use_triton(W) and indices.numel()):
            return _squared_error_torch(*inputs)
        from ._loss_kernel import launch_squared_error

        return launch_squared_error(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, error, dots = output
        ctx.save_for_backward(*inputs, error, dots)
        ctx.mark_non_differentiable(error, dots)

    @staticmethod
    def backward(ctx, g, *_):  # g: [N]
        values, indices, W, b, target, error, dots = ctx.saved_tensors
        need_values, _, need_W, need_b, need_target = ctx.needs_input_grad
        if torch.is_grad_enabled():  # for second derivatives, these depend on the inputs
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
    wide = wide_dtype(W)
    N, K = indices.shape
    sse, dots = W.new_empty(N, dtype=wide), W.new_empty(N, K, dtype=wide)
    return sse, W.new_empty(N, W.shape[1]), dots


_squared_error = register(_SquaredError, _fake)


# --- public ---------------------------------------------------------------------------------


def squared_error(
    values: Tensor, indices: Tensor, W: Tensor, b: Tensor, target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Squared error of the reconstruction of each token.

    values [N, K], W [F, D], b [D], target [N, D] floating, indices [N, K] int32 or int64 below F
    -> sse [N], error [N, D] in W's dtype and dots [N, K]; sse and dots in fp32 (fp64 for fp64 W).
    sse is differentiable in values, W, b and target, twice and more; error and dots are constants.
    The forward pass also computes the gradient of values, so backward only sums weight gradients;
    with create_graph=True it decodes again.

    Moves N K D elements of W and 2 N D more, costs 4 N K D FLOPs. ValueError for wrong shapes or
    dtypes.
    """
    check_shape("W", W, None, None)
    check_codes(values, indices)
    check_shape("target", target, indices.shape[0], W.shape[1])
    check_shape("b", b, W.shape[1])
    check_devices(values=values, indices=indices, W=W, b=b, target=target)
    return _squared_error(values, indices, W, b, target)
