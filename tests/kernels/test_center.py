"""Centering and total variance, against the formula in double precision."""

import pytest
import torch

from fastsae_kernels.center import center, center_reference
from fastsae_kernels.testing import assert_no_worse

SHAPES = [(1, 1), (7, 33), (64, 256), (65, 257), (200, 300), (2100, 3)]  # N, D
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "N{}-D{}".format(*s))


def make(shape, device, dtype=torch.float32, mean=0.0):
    N, D = shape
    x = torch.randn(N, D) + mean * torch.randn(D)
    return x.to(device, dtype), (mean + torch.randn(D)).to(device, dtype)


def wide(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


@each_shape
@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_no_worse_than_the_formula(device, shape, mean):
    """Also where the square of the mean is a million times the variance."""
    x, b = make(shape, device, mean=mean)
    assert_no_worse(
        lambda x, b: center(x, b, x.dtype),
        lambda x, b: tuple(t.detach() for t in center_reference(x, b, x.dtype)),
        *(x, b),
    )


@each_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_result_is_rounded_once(device, shape, dtype):
    x, b = make(shape, device, dtype)
    for out in {dtype, torch.float32} - {torch.bfloat16}:
        centered, variance = center(x, b, out)
        assert torch.equal(centered, (wide(x) - wide(b)).to(out))
        assert variance.dtype == wide(x).dtype


@each_shape
def test_bfloat16(device, shape):
    """Triton's interpreter cuts off the digits that a GPU rounds."""
    x, b = make(shape, device)
    got, expected = center(x, b, torch.bfloat16)[0], x - b
    assert got.dtype == torch.bfloat16
    assert (got - expected).abs().le(torch.finfo(torch.bfloat16).eps * expected.abs()).all()


@pytest.mark.parametrize("token", [0, 5, 64, 149])
def test_one_huge_token_costs_no_digits(device, token):
    x, b = make((150, 40), device)
    x[token] *= 1e4
    exact = center_reference(x.double(), b.double(), torch.float64)[1]
    usual = center_reference(x, b, x.dtype)[1]
    rounding = torch.finfo(x.dtype).eps * exact
    assert (center(x, b, x.dtype)[1] - exact).abs() <= 2 * (usual - exact).abs() + rounding


def test_a_constant_column_has_no_variance(device):
    x = torch.full((300, 5), 1234.5, device=device)
    centered, variance = center(x, x[0].clone(), x.dtype)
    assert variance == 0 and (centered == 0).all()


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_nothing_to_center(device, shape):
    x = torch.empty(shape, device=device)
    centered, variance = center(x, torch.ones(shape[1], device=device), torch.bfloat16)
    assert (centered.shape, centered.dtype, variance.item()) == (shape, torch.bfloat16, 0)


@pytest.mark.filterwarnings("ignore:invalid value")  # of numpy, in the interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_is_never_dropped(device, bad):
    x, b = make((70, 9), device)
    x[66, 4] = bad
    centered, variance = center(x, b, x.dtype)
    assert variance.isnan() and centered.isfinite().sum() == x.numel() - 1


def test_same_bits_twice_and_any_strides(device):
    x, b = make((130, 70), device)
    strided = [torch.stack([t, t], dim=-1)[..., 0] for t in (x, b)]
    again = center(strided[0], strided[1], x.dtype)
    for one, two in zip(center(x, b, x.dtype), again, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("x", "b", "message"),
    [
        (torch.ones(3), torch.ones(3), r"x must be floating point of shape \[any, any\]"),
        (torch.ones(3, 4), torch.ones(3), r"b must be floating point of shape \[4\]"),
        (torch.ones(3, 4), torch.ones(4, device="meta"), "b must be on the device of x, cpu"),
    ],
)
def test_wrong_arguments_are_named(x, b, message):
    with pytest.raises(ValueError, match=message):
        center(x, b, torch.float32)
