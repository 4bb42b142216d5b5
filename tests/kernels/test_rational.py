from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from fastsae_kernels.rational import rational, rational_reference
from fastsae_kernels.testing import assert_no_worse

SHAPES = [(), (1,), (7, 33), (2, 3, 5), (3, 1100), (40, 30), (0, 4), (3, 0)]
SHIFTS = {  # its shape beside h's
    "number": lambda shape: (),
    "per latent": lambda shape: shape[-1:],
    "per token": lambda shape: (*shape[:-1], 1),
    "per entry": lambda shape: shape,
    "amid": lambda shape: (shape[0], *[1] * (len(shape) - 2), shape[-1]),
}
DEGREES = [(3, 2), (5, 4), (9, 8)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HYPOTHESIS = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


def make(shape, degrees=(5, 4), shift="per latent", dtype=torch.float32, device="cpu"):
    """h, [a, b, c_in, c_out], shift; S is negative for positive t, and few t are clamped."""
    p, q = degrees
    c = torch.rand(p + q + 3)
    c[p + 1 : -2] *= -1
    c[-2] += 2
    shift = torch.randn(SHIFTS[shift](shape)) / 2 if shape else torch.tensor(0.25)
    return torch.randn(shape).to(device, dtype), c.to(device), shift.to(device)


def arguments(h, c, shift, degrees=(5, 4)):
    """In the order of `rational`"""
    a, b, c_in, c_out = c.split([degrees[0] + 1, degrees[1], 1, 1])
    return h, a, b, c_in[0], c_out[0], shift


def assert_many_no_worse(shape, degrees=(5, 4), dtype=torch.float32, device="cpu", **how):
    """assert_no_worse of several problems as if they were one.

    Each has few scalars for results, and the largest of few rounding errors is a matter of luck.
    """
    entries = torch.Size(shape).numel()
    count = 64 if entries < 10 else 16 if entries < 300 else 4
    problems = [make(shape, degrees, dtype=dtype, device=device, **how) for _ in range(count)]

    def many(op):
        return lambda *stacks: torch.stack(
            [op(*arguments(h, c, s, degrees)) for h, c, s in zip(*stacks, strict=True)]
        )

    stacks = (torch.stack(tensors) for tensors in zip(*problems, strict=True))
    assert_no_worse(many(rational), many(rational_reference), *stacks)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(shape, DTYPES[0]) for shape in SHAPES]
    + [(shape, dtype) for shape in ((7, 33), (3, 1100), (0, 4)) for dtype in DTYPES[1:]],
    ids=str,
)
def test_shapes_and_dtypes(shape, dtype, device):
    assert_many_no_worse(shape, dtype=dtype, device=device)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("shift", SHIFTS)
def test_every_kind_of_shift(shift, dtype, device):
    assert_many_no_worse((2, 5, 11), shift=shift, dtype=dtype, device=device)


@pytest.mark.parametrize("degrees", DEGREES, ids=str)
def test_degrees(degrees, device):
    assert_many_no_worse((7, 33), degrees, device=device)


@pytest.mark.parametrize("shift", ["number", "per latent"])
def test_cpu_chunks(shift, monkeypatch):
    monkeypatch.setattr(import_module("fastsae_kernels.rational"), "CHUNK", 50)
    assert_many_no_worse((7, 33), shift=shift)


def test_where_t_is_clamped(device):
    """At the end of [-1, 1] there is a gradient, beyond it there is none; S = 0 at t = 0."""
    c_in, shift = 1.5, 0.25
    h = (
        torch.tensor([-2.0, -1, -0.5, 0, 0.5, 1, 2], device=device) * c_in + shift
    ).requires_grad_()
    a, b = torch.rand(4, device=device), torch.rand(2, device=device)
    scalars = [torch.tensor(x, device=device) for x in (c_in, 1.0, shift)]
    for op in (rational, rational_reference):
        (gradient,) = torch.autograd.grad(op(h, a, b, *scalars).sum(), h)
        assert (gradient != 0).tolist() == [False, True, True, True, True, True, False]
    assert_no_worse(rational, rational_reference, h, a, b, *scalars)


def test_infinite_and_nan(device):
    h = torch.tensor([float("nan"), float("inf"), float("-inf"), 3.0, -3.0], device=device)
    h.requires_grad_()
    out = rational(h, torch.rand(4, device=device), torch.rand(2, device=device), 3.0, 2.0)
    (gradient,) = torch.autograd.grad(out.sum(), h)
    assert out[0].isnan() and torch.equal(out[1:3], out[3:])
    assert torch.equal(gradient[:3], torch.zeros(3, device=device))


@pytest.mark.parametrize("shift", SHIFTS)
def test_gradients(shift, device):
    h, c, s = make((2, 2, 3), (3, 2), shift, torch.float64, device)
    h[0, 0, 0] = 50.0  # clamped
    leaves = [t.double().requires_grad_() for t in (h, c, s)]
    assert gradcheck(lambda h, c, s: rational(*arguments(h, c, s, (3, 2))), leaves)


def test_a_second_derivative_is_refused(device):
    h, c, s = make((2, 3), device=device)
    out = rational(*arguments(h.requires_grad_(), c, s))
    (gradient,) = torch.autograd.grad(out.sum(), h, create_graph=True)
    with pytest.raises(RuntimeError, match="rational_backward has no derivative"):
        torch.autograd.grad(gradient.sum(), h)


@pytest.mark.parametrize("other", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtypes_may_differ(dtype, other, device):
    h, *others = arguments(*make((3, 4), dtype=dtype, device=device))
    leaves = [h.requires_grad_(), *(t.detach().to(other).requires_grad_() for t in others)]
    out = rational(*leaves)
    gradients = torch.autograd.grad(out.sum(), leaves)
    assert (out.dtype, out.shape) == (h.dtype, h.shape)
    assert [(g.dtype, g.shape) for g in gradients] == [(t.dtype, t.shape) for t in leaves]


def test_numbers_for_scalars(device):
    h, a, b, *_ = arguments(*make((3, 4), device=device))
    scalars = [torch.tensor(x, device=device) for x in (1.5, 0.5, 0.1)]
    assert torch.equal(rational(h, a, b, 1.5, 0.5, 0.1), rational(h, a, b, *scalars))
    assert torch.equal(rational(h, a, b, 1, 2), rational(h, a, b, 1.0, 2.0, 0))


def test_no_gradient_where_none_is_asked_for(device):
    h, a, b, c_in, c_out, shift = arguments(*make((3, 4), device=device))
    rational(h.requires_grad_(), a, b, c_in, c_out, shift).sum().backward()
    assert h.grad is not None and a.grad is None and shift.grad is None


def run(op, inputs, g):
    """Output and gradients"""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = op(*leaves)
    return [out, *torch.autograd.grad(out, leaves, g)]


def assert_same_bits(op, inputs, g, other_op, other_inputs, other_g):
    pairs = zip(run(op, inputs, g), run(other_op, other_inputs, other_g), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)


def test_same_bits_twice_and_any_strides(device):
    inputs, g = arguments(*make((6, 40), device=device)), torch.randn(6, 40, device=device)
    strided = [torch.stack([t, t], dim=-1)[..., 0] for t in inputs]
    assert_same_bits(rational, inputs, g, rational, inputs, g)
    assert_same_bits(rational, inputs, g, rational, strided, g.t().contiguous().t())


def test_registration_without_tokens(device):
    """test_library.py has some."""
    inputs = [t.detach() for t in arguments(*make((0, 6), device=device))]
    leaves = tuple(t.clone().requires_grad_() for t in inputs)
    torch.library.opcheck(torch.ops.fastsae.rational.default, leaves)
    constants = torch.ones(0, 6, device=device), *inputs, torch.float32
    torch.library.opcheck(torch.ops.fastsae.rational_backward.default, constants)


@settings(max_examples=15, derandomize=True, **HYPOTHESIS)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=4),
    dims=st.integers(0, 4),
    degrees=st.tuples(st.integers(0, 16), st.integers(1, 16)),
)
def test_any_shape(device, sizes, dims, degrees):
    shape = tuple(n for n, _ in sizes)
    h, c, _ = make(shape, degrees, "number", torch.float64, device)
    kept = [n if varies else 1 for n, varies in sizes][len(sizes) - min(dims, len(sizes)) :]
    shift = torch.randn(kept, dtype=torch.float64, device=device)
    leaves = [t.double().requires_grad_() for t in (h, c, shift)]
    outs = [op(*arguments(*leaves, degrees=degrees)) for op in (rational, rational_reference)]
    torch.testing.assert_close(*outs)
    got, expected = (torch.autograd.grad(out.sum(), leaves) for out in outs)
    torch.testing.assert_close(got, expected)


def test_best_fit_of_relu(device):
    """No (3, 2) fit has a smaller error on [-1, 1] than 2.185e-2.

    dr/da_i and dr/db_j are at most 1 there, and five coefficients are known to half of 1e-4.
    """
    a = torch.tensor([0.0218, 0.5, 1.5958, 1.1916], dtype=torch.float64, device=device)
    b = torch.tensor([0.0, 2.3832], dtype=torch.float64, device=device)
    t = torch.linspace(-1, 1, 4001, dtype=torch.float64, device=device)
    error = (rational(t, a, b, 1.0, 1.0) - t.relu()).abs().max()
    assert 2.1845e-2 <= error <= 2.1855e-2 + 5 * 0.5e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"h": torch.ones(3, 4, dtype=torch.int64)}, "h must be floating point of any shape"),
        ({"a": torch.ones(0)}, r"a must be floating point of shape \[p \+ 1\]"),
        ({"a": torch.ones(2, 2)}, r"a must be .* got torch.float32 of shape \[2, 2\]"),
        ({"b": torch.ones(0)}, r"b must be floating point of shape \[q\], q at least 1"),
        ({"b": torch.ones(2, dtype=torch.int64)}, "b must be .* got torch.int64"),
        ({"c_in": torch.ones(1)}, r"c_in must be floating point of shape \[\]"),
        ({"c_out": torch.ones(4)}, r"c_out must be floating point of shape \[\]"),
        ({"shift": torch.ones(3)}, r"shift must be .* broadcasts to h's, \[3, 4\], got .* \[3\]"),
        ({"shift": torch.ones(1, 3, 4)}, "shift must be floating point of a shape that"),
        ({"shift": torch.zeros(4, dtype=torch.int64)}, "shift must be floating point"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    good: dict[str, Any] = {"h": torch.ones(3, 4), "a": torch.ones(4), "b": torch.ones(2)}
    good |= {"c_in": 1.0, "c_out": 1.0, "shift": 0.0}
    rational(**good)
    with pytest.raises(ValueError, match=message):
        rational(**{**good, **changes})
