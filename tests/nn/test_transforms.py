"""SAEs under torch.compile and torch.func, with every activation."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, jacrev, vmap

from fastsae import SAE
from fastsae.nn import Activation, BatchTopK, Gated, JumpReLU, Rational, ReLU, TopK, Variational

D_IN, D_SAE = 6, 20

FIXED: dict[str, Callable[[], Activation]] = {
    "topk": lambda: TopK(k=3),
    "topk by magnitude": lambda: TopK(k=3, by="abs"),
    "topk with rotation": lambda: TopK(k=3, gradient="rotation"),
    "topk with dense rotation": lambda: TopK(k=3, gradient="rotation", rotation="dense"),
    "rational": lambda: Rational(k=3),
    "rational without support": lambda: Rational(k=3, support="none"),
    "variational": lambda: Variational(k=3),
}
"""Activations whose sizes do not depend on data."""

ACTIVATIONS = FIXED | {
    "batchtopk": lambda: BatchTopK(k=3),
    "relu": ReLU,
    "jumprelu": JumpReLU,
    "gated": Gated,
    "rational of relu": lambda: Rational(gate="relu"),
    "rational of jumprelu": lambda: Rational(gate="jumprelu"),
}


def make(name: str) -> tuple[SAE, dict[str, Tensor], Callable[..., Tensor]]:
    """An SAE that knows its threshold, its parameters, and a loss of those and of tokens."""
    sae = SAE(D_IN, D_SAE, ACTIVATIONS[name]())
    sae(torch.randn(50, D_IN))
    sae.eval()
    constants = {key: p.detach().clone() for key, p in sae.named_parameters()}
    return sae, constants, lambda p, x: functional_call(sae, p, (x,)).square().sum()


COMPILED = """
import torch
from fastsae import SAE
from fastsae.nn import CodesLinear, Rational, TopK, TopKLinear, Variational
from torch._dynamo.utils import counters
from torch.testing import assert_close

def compare(module, compiled, weights, x):
    outs = module(x), compiled(x)
    assert_close(*outs)
    assert_close(*(torch.autograd.grad(out.square().sum(), weights) for out in outs))

rotations = [TopK(k=3, gradient="rotation", rotation=rotation) for rotation in ("support", "dense")]
rationals = [Rational(k=3, support=support) for support in ("teacher", "none")]
for activation in (TopK(k=3), TopK(k=3, by="abs"), *rotations, *rationals, Variational(k=3)):
    torch._dynamo.reset()
    counters.clear()
    sae = SAE(6, 20, activation)
    compiled = torch.compile(sae, fullgraph=True, backend="aot_eager")
    for N in (21, 22, 32):
        compare(sae, compiled, (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec), torch.randn(N, 6))
    assert counters["stats"]["unique_graphs"] == 2, activation

block = torch.nn.Sequential(torch.nn.Linear(6, 6), TopKLinear(6, 40, k=3), CodesLinear(40, 5))
compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
compare(block, compiled, [*block.parameters()], torch.randn(8, 6))
"""


def test_compiles_once_more_when_the_number_of_tokens_changes():
    # in a process of its own: dynamo does not trace what checks the types of shapes in tests
    subprocess.run([sys.executable, "-c", COMPILED], check=True)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_func_grad_is_that_of_autograd(name):
    sae, constants, loss = make(name)
    x = torch.randn(9, D_IN)
    expected = torch.autograd.grad(
        sae(x).square().sum(), list(sae.parameters()), materialize_grads=True
    )
    found = grad(loss)(constants, x)
    for a, b in zip(expected, found.values(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", FIXED)
def test_gradients_of_each_token(name):
    """By vmap over tokens, they sum to that of all; jacrev is made of the same parts."""
    sae, constants, loss = make(name)
    x = torch.randn(4, D_IN)
    whole = grad(loss)(constants, x)
    each = vmap(grad(loss), (None, 0))(constants, x[:, None])
    out = sae(x).detach()
    jacobian = jacrev(lambda p: functional_call(sae, p, (x,)))(constants)
    for key, gradient in whole.items():
        torch.testing.assert_close(each[key].sum(0), gradient)
        chained = (2 * out.flatten()) @ jacobian[key].flatten(0, 1).flatten(1)
        torch.testing.assert_close(chained, gradient.flatten())
