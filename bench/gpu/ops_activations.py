"""The activations and the gradient of the rotation trick, as they are timed."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastsae_kernels.jumprelu import jumprelu, jumprelu_reference
from fastsae_kernels.rational import rational, rational_reference
from fastsae_kernels.rotation import rotation_gradients

from .checks import bf16, fp32
from .checks_encode import tf32
from .checks_rotation import rotation_dense
from .clock import Cost
from .data import Problem
from .op import Op, Way

# --- activations ----------------------------------------------------------------------------


def rational_inputs(p: Problem, dense: bool, leaf: bool) -> tuple:
    h = p.normal(p.chunk(), p.F, dtype=bf16) if dense else p.normal(p.N, p.K)
    scalars = (torch.tensor(c, device=p.device) for c in (2.5, 0.9, 0.1))
    tensors = [h, p.normal(10), p.normal(8, std=0.3), *scalars]
    return tuple(t.requires_grad_(leaf) for t in tensors)


def elementwise_cost(p: Problem, h: Tensor, *_: Any, tensors: int, flops: int) -> Cost:
    """So many tensors like h, so many FLOPs an entry."""
    return Cost(tensors * h.nbytes, flops * h.numel())


def with_gradients(function: Callable[..., Tensor]) -> Callable[..., object]:
    """A call and its backward pass, for a gradient of the values themselves."""

    def run(*arguments):
        out = function(*arguments)
        leaves = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
        return torch.autograd.grad(out, leaves, out.detach())

    return run


def rational_op(dense: bool, backward: bool) -> Op:
    where, what = "(N, F) chunk" if dense else "support", " + gradients" if backward else ""
    wrap = with_gradients if backward else (lambda function: function)
    return Op(
        name=f"rational, {where}{what}",
        group="rational",
        make=partial(rational_inputs, dense=dense, leaf=backward),
        run=wrap(rational),
        cost=partial(elementwise_cost, tensors=5 if backward else 2, flops=136 if backward else 34),
        others={"torch": Way(wrap(rational_reference))},
    )


def jumprelu_inputs(p: Problem, leaf: bool) -> tuple:
    h, threshold = p.normal(p.chunk(), p.F, dtype=bf16), p.normal(p.F, dtype=bf16).abs()
    return h.requires_grad_(leaf), threshold.requires_grad_(leaf), 0.3


def jumprelu_op(backward: bool) -> Op:
    wrap = with_gradients if backward else (lambda function: function)
    return Op(
        name="jumprelu, (N, F) chunk" + (" + gradients" if backward else ""),
        group="jumprelu",
        make=partial(jumprelu_inputs, leaf=backward),
        run=wrap(jumprelu),
        cost=partial(elementwise_cost, tensors=5 if backward else 2, flops=6 if backward else 1),
        others={"torch": Way(wrap(jumprelu_reference))},
    )


# --- rotation -------------------------------------------------------------------------------


def rotation_inputs(p: Problem, mode: str) -> tuple:
    data = p.normal(p.N, p.D), p.weights(fp32), p.normal(p.F, std=0.1), p.weights(fp32)
    return *data, *p.codes(fp32), p.normal(p.N, p.D), p.normal(p.N, p.K), mode


def rotation_cost(p: Problem, *arguments: Any) -> Cost:
    """The FLOPs of the cheaper way; both weights and three gradients."""
    E = p.D if arguments[-1] == "dense" else 0
    gram = 4 * (p.F + p.N) * p.D * (p.D + E)
    dense = 2 * p.N * p.F * (p.D + E) + 4 * p.N * p.F * p.D
    return Cost(12 * p.F * p.D + 12 * p.N * p.D, min(gram, dense), "tf32")


def rotation_op(mode: str) -> Op:
    return Op(
        name=f"rotation gradients, {mode}",
        group="rotation",
        make=partial(rotation_inputs, mode=mode),
        run=rotation_gradients,
        cost=rotation_cost,
        others={"dense formula": Way(rotation_dense, shapes="C")},
        around=tf32,
    )


ACTIVATIONS = [
    *(rational_op(dense, backward) for dense in (False, True) for backward in (False, True)),
    *(jumprelu_op(backward) for backward in (False, True)),
    *(rotation_op(mode) for mode in ("support", "dense")),
]
