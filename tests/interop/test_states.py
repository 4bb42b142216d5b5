"""Accelerated modules in states and contexts in which their library's own code has to run."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.testing import assert_close

import fastsae
from fastsae.dropin import dense

from .accelerated import KINDS, dead_latents, recon_and_codes, with_true_gradients
from .peers import D_IN

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries

SOME = [
    "sparsify",
    "sae_lens standard",
    "sae_lens topk",
    "sae_lens jumprelu training",
    "sae_lens matryoshka training",
    "dictionary_learning gated",
    "dictionary_learning topk",
    "dictionary_learning jumprelu",
]
"""One for each way in which pre-activations are computed."""


@pytest.fixture(autouse=True)
def always_sparse(monkeypatch):
    monkeypatch.setattr(dense, "MIN_TOKENS", 0)
    monkeypatch.setattr(dense.AboveThreshold, "limits", lambda *_: dense.Limits(1.0, 1.0))


def tokens(N: int = 33) -> torch.Tensor:
    return torch.randn(N, D_IN, dtype=torch.float64)


def both(name: str) -> tuple[Any, Any]:
    theirs = KINDS[name].make()
    return theirs, fastsae.accelerate(copy.deepcopy(theirs))


@pytest.mark.parametrize("name", [name for name in SOME if name != "dictionary_learning topk"])
def test_on_the_meta_device(name):
    """dictionary_learning's TopK reads its k from the device, which meta has no values for."""
    theirs, ours = both(name)
    shapes = [[t.shape for t in recon_and_codes(sae, tokens())] for sae in (theirs, ours)]
    assert shapes[0] == shapes[1]
    abstract = ours.to("meta"), tokens().to("meta")
    assert [t.shape for t in recon_and_codes(*abstract)] == shapes[0]


@pytest.mark.parametrize("name", SOME)
def test_hooks_of_all_modules_change_what_they_change_in_the_library(name):
    theirs, ours = both(name)
    x = tokens()

    def doubled(module: nn.Module, _: Any, output: Any) -> Any:
        inner = isinstance(module, nn.Linear) or type(module).__name__ == "HookPoint"
        return 2 * output if inner else output

    hook = register_module_forward_hook(doubled)
    try:
        assert_close(recon_and_codes(ours, x), recon_and_codes(theirs, x))
    finally:
        hook.remove()


@pytest.mark.parametrize("name", [n for n in SOME if n not in ("sparsify", SOME[3])])
def test_transforms(name):
    """Of torch.func, for which some ops of fastsae have no rules; nor have sparsify's, and those of
    SAELens' JumpReLU in training."""
    (theirs, ours), x = both(name), tokens(12)
    with torch.no_grad():
        found = [torch.func.vmap(sae)(x.view(3, 4, D_IN)) for sae in (theirs, ours)]
    assert_close(*found)
    assert_close(*(torch.func.jvp(sae, (x,), (x.flip(0),)) for sae in (ours, theirs)))
    assert_close(*(torch.func.jacrev(sae)(x[:2]) for sae in (ours, theirs)))


def test_a_trace_serves_other_inputs():
    (theirs, ours), x = both("dictionary_learning relu"), tokens()
    with torch.no_grad():
        traced: Any = torch.jit.trace(ours.requires_grad_(False), x / 10, check_trace=False)
        for other in (10 * x, tokens(57)):
            assert_close(traced(other), theirs(other))


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda p: p.mT.contiguous().mT if p.dim() == 2 else p,
    "strided": lambda p: torch.stack([p, p], -1)[..., 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SOME)
def test_parameters_in_any_memory_layout(name, layout):
    theirs, x = KINDS[name].make(), tokens().T.contiguous().T
    ours = fastsae.accelerate(copy.deepcopy(theirs))
    for parameter in ours.parameters():
        parameter.data = LAYOUTS[layout](parameter.data)
    theirs = with_true_gradients(theirs)
    assert_close(recon_and_codes(ours, x), recon_and_codes(theirs, x))
    losses = [KINDS[name].loss(sae, x, dead_latents()) for sae in (ours, theirs)]
    got, expected = (
        torch.autograd.grad(loss, [*sae.parameters()], materialize_grads=True, allow_unused=True)
        for loss, sae in zip(losses, (ours, theirs), strict=True)
    )
    assert_close(got, expected)


@pytest.mark.parametrize("name", SOME[:-1])
def test_frozen_parameters(name):
    """Each alone without a gradient, and each alone with one, which the last one's thresholds do
    not have."""
    theirs, x = KINDS[name].make(), tokens()
    ours = fastsae.accelerate(copy.deepcopy(theirs))
    theirs = with_true_gradients(theirs)
    for parameter in dict(theirs.named_parameters()):
        for trained in (False, True):
            found = []
            for sae in (ours, theirs):
                for other, p in sae.named_parameters():
                    p.requires_grad_(trained == (other == parameter))
                loss = KINDS[name].loss(sae, x, dead_latents())
                wanted = [p for p in sae.parameters() if p.requires_grad]
                found.append(
                    torch.autograd.grad(loss, wanted, materialize_grads=True, allow_unused=True)
                )
            assert_close(*found)
