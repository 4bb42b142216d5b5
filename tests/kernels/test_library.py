"""Every public op as a library op: registered right, and called where someone looks at calls."""

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastsae_kernels
from fastsae_kernels import decode
from fastsae_kernels._launch import use_triton

from .every_op import OPS, RAGGED, D, arguments_on, gradients, outputs

N = 5

CHECKS = "test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"
"""All that opcheck knows. With interpreted kernels, the last would trace the same graph."""


class Recorder(TorchDispatchMode):
    """The calls of library ops."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastsae":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def test_no_public_op_is_left_out():
    assert {name.split()[0] for name in OPS} == set(fastsae_kernels.__all__)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.filterwarnings("ignore")
def test_is_registered_right(name, device):
    """torch.library.opcheck of every library op that a call of the public one goes through."""
    op, make = OPS[name]
    checks = CHECKS[:3] if device == "cpu" and use_triton(torch.empty(0)) else CHECKS
    with Recorder() as recorder:
        gradients(op, arguments_on(device, make(N)))
    assert recorder.calls
    for func, args, kwargs in recorder.calls:
        differentiable = OPDEFS[func._schema.name]._backward_fn is not None
        leaves = [
            a.detach().requires_grad_(differentiable and a.is_floating_point())
            if isinstance(a, Tensor)
            else a
            for a in args
        ]
        torch.library.opcheck(func, tuple(leaves), kwargs, test_utils=checks)


@pytest.mark.parametrize("name", OPS)
def test_seen_or_not_seen_the_bits_are_the_same(name, device):
    """The library op, which a dispatch mode sees, and what eager mode calls in its place."""
    op, make = OPS[name]
    arguments = arguments_on(device, make(N))
    with Recorder():
        seen = gradients(op, arguments)
    with torch.no_grad():
        constant = outputs(op(*arguments))
    unseen = gradients(op, arguments)
    for a, b in zip([*seen, *seen], [*unseen, *constant, *unseen[len(constant) :]], strict=True):
        assert torch.equal(a, b)


def test_fake_tensors_need_no_mode():
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in OPS["decode"][1](N)]
    assert decode(*fake).shape == (N, D)


@pytest.mark.parametrize("name", [name for name in OPS if name not in RAGGED])
def test_meta_tensors_have_the_shapes_of_others(name):
    op, make = OPS[name]
    arguments = make(N)
    found = gradients(op, arguments_on("meta", arguments))
    for a, b in zip(gradients(op, arguments), found, strict=True):
        assert b.is_meta and (a.shape, a.dtype) == (b.shape, b.dtype)
