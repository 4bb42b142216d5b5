"""Every public op as a library op: registered right, and traced in one graph by torch.compile."""

from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

import fastsae_kernels
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

N, K, F, D = 5, 3, 12, 8


def floats(*shape: int) -> Tensor:
    return torch.randn(shape).requires_grad_()


def indices() -> Tensor:
    return torch.randint(F, (N, K))


def encoder() -> tuple[Tensor, ...]:
    return floats(N, D), floats(F, D), floats(F)


def rotated(gradient: Gradient) -> Callable:
    return lambda x, W_enc, b_enc, W_dec, b_dec: encode_decode(
        x, W_enc, b_enc, W_dec, b_dec, K, "value", gradient
    )


OPS: dict[str, tuple[Callable, Callable[[], tuple]]] = {
    "decode": (decode, lambda: (floats(N, K), indices(), floats(F, D))),
    "gather_dot": (gather_dot, lambda: (floats(N, D), indices(), floats(F, D))),
    "scatter_outer": (scatter_outer, lambda: (floats(N, K), indices(), floats(N, D), F)),
    "squared_error": (
        squared_error,
        lambda: (floats(N, K), indices(), floats(F, D), floats(D), floats(N, D)),
    ),
    "topk": (topk, lambda: (floats(N, F), K)),
    "topk_batch": (topk_batch, lambda: (floats(N, F), N * K)),
    "encode_topk": (encode_topk, lambda: (*encoder(), K, "abs")),
    "encode_topk shadow": (
        lambda x, W, b: encode_topk(x, W, b, K, shadow=W.detach().bfloat16()),
        encoder,
    ),
    "encode_above": (encode_above, lambda: (*encoder(), floats(F))),
    "encode_topk_batch": (encode_topk_batch, lambda: (*encoder(), N * K, "abs")),
    "rational": (
        rational,
        lambda: (floats(N, F), floats(4), floats(2), floats(), floats(), floats(N, 1)),
    ),
    "jumprelu": (lambda h, t: jumprelu(h, t, 0.5), lambda: (floats(N, F), floats(F))),
    "jumprelu_l0": (lambda h, t: jumprelu_l0(h, t, 0.5), lambda: (floats(N, F), floats(F))),
    **{
        f"encode_decode {gradient}": (
            rotated(gradient),
            lambda: (*encoder(), floats(F, D), floats(D)),
        )
        for gradient in get_args(Gradient)
    },
}

RAGGED = "encode_above", "encode_topk_batch"
"""Whose columns the data decide: torch.compile traces them if it is told to."""


def gradients(op: Callable, arguments: tuple) -> list[Tensor]:
    """Outputs, then the gradient of every leaf."""
    outs = op(*arguments)
    outs = outs if isinstance(outs, tuple) else (outs,)
    leaves = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    loss = torch.stack([out.square().sum() for out in outs if out.requires_grad]).sum()
    found = torch.autograd.grad(loss, leaves, materialize_grads=True)
    return [*outs, *found]


def arguments_on(device: str, make: Callable[[], tuple]) -> tuple:
    return tuple(
        a.detach().to(device).requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a
        for a in make()
    )


@pytest.mark.parametrize("name", OPS)
def test_compiles_in_one_graph(name, device):
    op, make = OPS[name]
    arguments = arguments_on(device, make)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    expected = gradients(op, arguments)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=name in RAGGED):
        for eager, traced in zip(expected, gradients(compiled, arguments), strict=True):
            assert torch.equal(eager, traced)


def test_no_public_op_is_left_out():
    assert {name.split()[0] for name in OPS} == set(fastsae_kernels.__all__)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.filterwarnings("ignore")
def test_is_registered_right(name, device):
    """torch.library.opcheck of every library op that a call of the public one goes through."""
    op, make = OPS[name]
    calls = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "fastsae":
                calls.append((func, args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    with Recorder():
        gradients(op, arguments_on(device, make))
    assert calls
    for func, args, kwargs in calls:
        differentiable = OPDEFS[func._schema.name]._backward_fn is not None
        leaves = [
            a.detach().requires_grad_(differentiable and a.is_floating_point())
            if isinstance(a, Tensor)
            else a
            for a in args
        ]
        torch.library.opcheck(func, tuple(leaves), kwargs)
