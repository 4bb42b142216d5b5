"""Every public op with arguments for N tokens, for tests of what all of them have to satisfy."""

from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor

from fastsae_kernels import (
    decode,
    encode_above,
    encode_decode,
    encode_topk,
    encode_topk_batch,
    gather_dot,
    jumprelu,
    jumprelu_l0,
    rational,
    scatter_outer,
    squared_error,
    topk,
    topk_batch,
)
from fastsae_kernels.encode_decode import Gradient

K, F, D = 3, 12, 8

RAGGED = "encode_above", "encode_topk_batch"
"""Whose columns the data decide: torch.compile traces them if it is told to."""

ROTATIONS = "encode_decode rotation_support", "encode_decode rotation_dense"

ONCE = "rational", "jumprelu", "jumprelu_l0", *ROTATIONS
"""Whose gradients have no derivative."""


def floats(*shape: int) -> Tensor:
    return torch.randn(shape).requires_grad_()


def codes(N: int) -> tuple[Tensor, Tensor]:
    return floats(N, K), torch.randint(F, (N, K))


def encoder(N: int) -> tuple[Tensor, ...]:
    return floats(N, D), floats(F, D), floats(F)


def rotated(gradient: Gradient) -> Callable:
    return lambda x, W_enc, b_enc, W_dec, b_dec: encode_decode(
        x, W_enc, b_enc, W_dec, b_dec, K, "value", gradient
    )


OPS: dict[str, tuple[Callable[..., Any], Callable[[int], tuple[Tensor, ...]]]] = {
    "decode": (decode, lambda N: (*codes(N), floats(F, D))),
    "gather_dot": (gather_dot, lambda N: (floats(N, D), codes(N)[1], floats(F, D))),
    "scatter_outer": (
        lambda v, i, x: scatter_outer(v, i, x, F),
        lambda N: (*codes(N), floats(N, D)),
    ),
    "squared_error": (
        squared_error,
        lambda N: (*codes(N), floats(F, D), floats(D), floats(N, D)),
    ),
    "topk": (lambda pre: topk(pre, K), lambda N: (floats(N, F),)),
    "topk_batch": (lambda pre: topk_batch(pre, K * len(pre)), lambda N: (floats(N, F),)),
    "encode_topk": (lambda x, W, b: encode_topk(x, W, b, K, "abs"), encoder),
    "encode_topk shadow": (
        lambda x, W, b: encode_topk(x, W, b, K, shadow=W.detach().bfloat16()),
        encoder,
    ),
    "encode_above": (encode_above, lambda N: (*encoder(N), floats(F).detach())),
    "encode_topk_batch": (
        lambda x, W, b: encode_topk_batch(x, W, b, K * len(x), "abs"),
        encoder,
    ),
    "rational": (
        rational,
        lambda N: (floats(N, F), floats(4), floats(2), floats(), floats(), floats(N, 1)),
    ),
    "jumprelu": (lambda h, t: jumprelu(h, t, 0.5), lambda N: (floats(N, 2, F), floats(F))),
    "jumprelu_l0": (lambda h, t: jumprelu_l0(h, t, 0.5), lambda N: (floats(N, 2, F), floats(F))),
    **{
        f"encode_decode {gradient}": (
            rotated(gradient),
            lambda N: (*encoder(N), floats(F, D + 1), floats(D + 1)),
        )
        for gradient in get_args(Gradient)
    },
}


def leaves_of(arguments: tuple[Tensor, ...]) -> list[Tensor]:
    return [a for a in arguments if a.requires_grad]


def outputs(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def gradients(op: Callable, arguments: tuple[Tensor, ...]) -> list[Tensor]:
    """Outputs, then the gradient of every leaf."""
    outs = outputs(op(*arguments))
    loss = torch.stack([out.square().sum() for out in outs if out.requires_grad]).sum()
    return [*outs, *torch.autograd.grad(loss, leaves_of(arguments), materialize_grads=True)]


def arguments_on(
    device: str, arguments: tuple[Tensor, ...], dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """The same on a device, floating ones in dtype."""
    return tuple(
        a.detach()
        .to(device, dtype if a.is_floating_point() else None)
        .requires_grad_(a.requires_grad)
        for a in arguments
    )
