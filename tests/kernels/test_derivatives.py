"""Every public op under autograd and torch.func: right derivatives, or an error that names it.

On the torch path; each op's own tests check its gradients on the kernels too.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradgradcheck
from torch.func import grad, jvp, vjp, vmap

from .every_op import ONCE, OPS, RAGGED, arguments_on, leaves_of, outputs

N = 4

TWICE = [name for name in OPS if name not in ONCE]


def case(name: str) -> tuple[Callable, list[Tensor]]:
    """What maps the leaves, in float64, to the op's first result; and the leaves."""
    op, make = OPS[name]
    arguments = arguments_on("cpu", make(N), torch.float64)
    leaves = leaves_of(arguments)

    def result(*given: Tensor) -> Tensor:
        left = iter(given)
        with_given = (next(left) if any(a is x for x in leaves) else a for a in arguments)
        return outputs(op(*with_given))[0]

    return result, leaves


def loss(name: str) -> tuple[Callable, list[Tensor]]:
    result, leaves = case(name)
    return lambda *given: result(*given).square().sum(), leaves


def penalty(of: Callable) -> Callable:
    """The squared norm of a loss's gradient."""

    def norm(*leaves: Tensor) -> Tensor:
        found = torch.autograd.grad(of(*leaves), leaves, create_graph=True, materialize_grads=True)
        return torch.stack([g.square().sum() for g in found]).sum()

    return norm


@pytest.mark.parametrize("name", TWICE)
def test_second_derivatives(name):
    result, leaves = case(name)
    assert gradgradcheck(result, leaves, fast_mode=True)


@pytest.mark.parametrize("name", ONCE)
def test_second_derivatives_that_do_not_exist_are_refused(name):
    of, leaves = loss(name)
    with pytest.raises(RuntimeError, match=r"fastsae::\w+ has no derivative"):
        torch.autograd.grad(penalty(of)(*leaves), leaves, allow_unused=True)


@pytest.mark.parametrize("name", OPS)
def test_func_grad(name):
    of, leaves = loss(name)
    expected = torch.autograd.grad(of(*leaves), leaves, materialize_grads=True)
    every = tuple(range(len(leaves)))
    constants = [leaf.detach() for leaf in leaves]
    pull = vjp(of, *constants)[1]
    found = grad(of, every)(*constants), pull(torch.ones((), dtype=torch.float64))
    for gradients in found:
        for a, b in zip(expected, gradients, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", TWICE)
def test_func_grad_of_grad(name):
    of, leaves = loss(name)
    expected = torch.autograd.grad(penalty(of)(*leaves), leaves, materialize_grads=True)
    every = tuple(range(len(leaves)))

    def norm(*given: Tensor) -> Tensor:
        return torch.stack([g.square().sum() for g in grad(of, every)(*given)]).sum()

    found = grad(norm, every)(*(leaf.detach() for leaf in leaves))
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", [name for name in OPS if name not in RAGGED])
def test_vmap_of_grad(name):
    """Gradients for several values of the first leaf are those of each alone."""
    of, leaves = loss(name)
    first, *others = (leaf.detach() for leaf in leaves)
    several = torch.stack([first, 2 * first, -first])
    found = vmap(grad(of), (0, *(None for _ in others)))(several, *others)
    for one, gradient in zip(several, found, strict=True):
        torch.testing.assert_close(gradient, grad(of)(one, *others))


@pytest.mark.parametrize("name", RAGGED)
def test_vmap_of_results_of_several_sizes_is_refused(name):
    result, (x, W, b) = case(name)
    x, W, b = x.detach(), W.detach(), b.detach()
    with pytest.raises(RuntimeError, match=f"vmap of fastsae::{name}: its results differ in size"):
        vmap(lambda scale: result(x * scale, W, b))(torch.tensor([0.0, 1.0, 2.0]))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own use of it
@pytest.mark.parametrize("name", [n for n in OPS if n not in ("topk", "topk_batch")])
def test_forward_mode_is_refused(name):
    """For it would find derivatives of 0."""
    result, leaves = case(name)
    leaves = tuple(leaf.detach() for leaf in leaves)
    with pytest.raises(NotImplementedError, match=r"fastsae::\w+ has no derivative in forward"):
        jvp(result, leaves, leaves)
