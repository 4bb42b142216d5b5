import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from fastsae_kernels.jumprelu import (
    jumprelu,
    jumprelu_l0,
    jumprelu_l0_reference,
    jumprelu_reference,
)
from fastsae_kernels.testing import assert_no_worse

from .parametrize import pairwise

SHAPES = [  # the last is F
    (1,),
    (1, 1),
    (7, 33),
    (2, 3, 5),
    (3, 1100),  # two tiles of columns
    (130, 1030),  # three spans of rows
    (300, 20),  # a tile has more rows than a span
    (0, 4),
    (3, 0),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HYPOTHESIS = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
PAIRS = [(jumprelu, jumprelu_reference), (jumprelu_l0, jumprelu_l0_reference)]
each_op = pytest.mark.parametrize(("op", "reference"), PAIRS, ids=["jumprelu", "l0"])


def make(shape, dtype=torch.float32, device="cpu"):
    """h, threshold"""
    h, threshold = torch.randn(shape), torch.rand(shape[-1]) - 0.25
    return h.to(device, dtype), threshold.to(device)


def run(op, h, threshold, bandwidth=0.5, g=None):
    """Output and gradients, of h only where it has one."""
    h, threshold = (t.detach().requires_grad_() for t in (h, threshold))
    out = op(h, threshold, bandwidth)
    g = torch.arange(1.0, out.numel() + 1, device=h.device).view(out.shape) if g is None else g
    gradients = torch.autograd.grad(out, (h, threshold), g.to(out.dtype), allow_unused=True)
    return [t for t in (out, *gradients) if t is not None]


def assert_same_bits(op, inputs, reference, others):
    pairs = zip(run(op, *inputs), run(reference, *others), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)


@each_op
@pairwise(half_threshold=[False, True], dtype=DTYPES, shape=SHAPES)
def test_outputs_and_gradients(op, reference, shape, dtype, half_threshold, device):
    h, threshold = make(shape, dtype, device)
    threshold = threshold.to(dtype) if half_threshold else threshold
    assert_no_worse(lambda h, t: op(h, t, 0.5), lambda h, t: reference(h, t, 0.5), h, threshold)


@each_op
def test_ties_and_edges_of_the_window(op, reference, device):
    """Entries at the threshold are not above it, and those at the window's edges not inside."""
    threshold = torch.tensor([0.5, 0.25, 0.0], device=device)
    steps = torch.tensor([-0.5, -0.25, -0.125, 0.0, 0.125, 0.25, 0.5], device=device)
    h = threshold + steps[:, None]
    assert_same_bits(op, (h, threshold), reference, (h, threshold))
    _, *gradients = run(op, h, threshold, g=torch.ones(7, *[3] * (op is jumprelu), device=device))
    slope = threshold if op is jumprelu else torch.ones(3, device=device)
    assert torch.equal(gradients[-1], -slope / 0.5 * 3)


def test_values(device):
    h = torch.tensor([[-1.0, 0.25, 0.5, 0.75], [2.0, -0.0, 0.0, 1.0]], device=device)
    threshold = torch.tensor([0.0, 0.0, 0.5, 1.0], device=device)
    expected = torch.tensor([[0.0, 0.25, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0]], device=device)
    assert torch.equal(jumprelu(h, threshold, 0.1), expected)
    assert jumprelu_l0(h, threshold, 0.1).tolist() == [1, 1]


@each_op
def test_infinite_and_nan(op, reference, device):
    nan, inf = float("nan"), float("inf")
    h = torch.tensor([[nan, inf, -inf, 1.0]], device=device)
    threshold = torch.full((4,), 0.5, device=device)
    out, *gradients = run(op, h, threshold)
    expected = [[2.0]] if op is jumprelu_l0 else [[nan, inf, 0.0, 1.0]]
    expected = torch.tensor(expected, device=device).view(out.shape)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    for gradient in gradients:
        assert gradient.isfinite().all()


def test_gradient_of_h_away_from_thresholds(device):
    h, threshold = make((3, 5), torch.float64, device)
    h = torch.where((h - threshold).abs() < 0.01, h + 0.1, h).requires_grad_()
    assert gradcheck(lambda h: jumprelu(h, threshold.double(), 1e-3), h)


@each_op
def test_gradient_of_the_threshold_is_the_slope_of_a_mean(op, reference, device):
    """Averaged over the window, the output falls by what the pseudo-derivative says."""
    threshold, bandwidth = torch.tensor([0.5], dtype=torch.float64, device=device), 0.25
    h = torch.linspace(0, 1, 4097, dtype=torch.float64, device=device)[:, None]
    mean = run(op, h, threshold, bandwidth, torch.full((4097, *[1] * (op is jumprelu)), 1 / 4096))
    expected = -threshold if op is jumprelu else -torch.ones_like(threshold)
    assert (mean[-1] - expected).abs() <= 1 / (4096 * bandwidth)


@each_op
def test_in_float64(op, reference, device):
    """No constant passes through float32."""
    h, threshold = make((6, 40), torch.float64, device)
    got, expected = (run(f, h, threshold.double(), 0.1) for f in (op, reference))
    torch.testing.assert_close(got, expected)


@each_op
def test_a_second_derivative_is_refused(op, reference, device):
    h, threshold = (t.requires_grad_() for t in make((2, 3), device=device))
    out = op(h, threshold, 2.0)
    g = torch.ones_like(out).requires_grad_()
    (gradient,) = torch.autograd.grad(out, threshold, g, create_graph=True)
    with pytest.raises(RuntimeError, match="jumprelu_backward has no derivative"):
        torch.autograd.grad(gradient.sum(), g)


@each_op
@pytest.mark.parametrize("other", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtypes_may_differ(op, reference, dtype, other, device):
    h, threshold = make((3, 4), dtype, device)
    out, *gradients = run(op, h, threshold.to(other))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert out.dtype == (dtype if op is jumprelu else wide)
    assert [g.dtype for g in gradients] == ([dtype, other] if op is jumprelu else [other])


@each_op
def test_same_bits_twice_and_any_strides(op, reference, device):
    inputs = make((6, 40), device=device)
    assert_same_bits(op, inputs, op, inputs)
    assert_same_bits(op, inputs, op, [torch.stack([t, t], dim=-1)[..., 0] for t in inputs])
    g = torch.randn(6, *[40] * (op is jumprelu), device=device)
    strided = torch.stack([g, g], dim=-1)[..., 0]
    for x, y in zip(run(op, *inputs, g=g), run(op, *inputs, g=strided), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("l0", [False, True])
@pytest.mark.parametrize("shape", [(0, 6), (4, 0)], ids=str)
def test_registration_of_nothing(shape, l0, device):
    """test_library.py has pre-activations."""
    h, threshold = make(shape, device=device)
    leaves = h.clone().requires_grad_(), threshold.clone().requires_grad_()
    torch.library.opcheck(torch.ops.fastsae.jumprelu.default, (*leaves, 0.5, l0))
    g = torch.ones(shape[: 1 if l0 else 2], device=device)
    constants = g, h, threshold, 0.5, l0
    torch.library.opcheck(torch.ops.fastsae.jumprelu_backward.default, constants)


@each_op
@settings(max_examples=15, derandomize=True, **HYPOTHESIS)
@given(
    rows=st.lists(st.integers(0, 6), max_size=3),
    F=st.integers(0, 40),
    bandwidth=st.floats(0.01, 4),
)
def test_any_shape(op, reference, device, rows, F, bandwidth):
    h, threshold = make((*rows, F), torch.float64, device)
    got, expected = (run(f, h, threshold.double(), bandwidth) for f in (op, reference))
    torch.testing.assert_close(got, expected)


@each_op
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"h": torch.ones(3, 4, dtype=torch.int64)}, "h must be floating point of shape"),
        ({"h": torch.tensor(1.0)}, r"h must be floating point of shape \[..., F\], got"),
        ({"threshold": torch.ones(3)}, r"threshold must be .* of shape \[4\], got .* \[3\]"),
        ({"threshold": torch.tensor(1.0)}, "threshold must be floating point of shape"),
        ({"threshold": torch.ones(4, dtype=torch.int64)}, "threshold must be floating point"),
        ({"bandwidth": 0.0}, "bandwidth must be positive, got 0.0"),
        ({"bandwidth": float("nan")}, "bandwidth must be positive, got nan"),
    ],
)
def test_wrong_arguments_are_named(op, reference, changes, message):
    good = {"h": torch.ones(3, 4), "threshold": torch.ones(4), "bandwidth": 1.0}
    op(**good)
    with pytest.raises(ValueError, match=message):
        op(**{**good, **changes})
