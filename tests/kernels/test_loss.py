import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from fastsae_kernels import squared_error
from fastsae_kernels._launch import use_triton
from fastsae_kernels.loss import squared_error_reference
from fastsae_kernels.testing import assert_no_worse

SHAPES = [  # N, K, F, D
    (1, 1, 1, 1),
    (7, 3, 20, 33),  # nothing is a power of two
    (3, 9, 40, 128),
    (2, 40, 60, 130),  # three blocks of columns
    (2, 150, 200, 1030),
    (2, 300, 60, 70),  # more rows than a block holds, and two blocks of columns
    (0, 4, 8, 16),
    (3, 0, 8, 16),
]


def make(shape, dtype=torch.float32, device="cpu"):
    """values, indices (repeats allowed), W, b, target"""
    N, K, F, D = shape
    sizes = (N, K), (F, D), (D,), (N, D)
    v, W, b, target = (torch.randn(s).to(device, dtype) for s in sizes)
    return v, torch.randint(F, (N, K), device=device), W, b, target


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "N{}-K{}-F{}-D{}".format(*s))
def test_outputs_and_gradients(device, shape):
    assert_no_worse(squared_error, squared_error_reference, *make(shape, device=device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES[:-2], ids=lambda s: "N{}-K{}-F{}-D{}".format(*s))
def test_half_precision(device, shape, dtype):
    """No worse than twice the reference in that dtype, though it returns sums in float32."""
    args = make(shape, dtype, device)
    exact = squared_error_reference(*(t.double() if t.is_floating_point() else t for t in args))
    same = squared_error_reference(*args)
    for name, got, s, e in zip(
        ("sse", "error", "dots"), squared_error(*args), same, exact, strict=True
    ):
        assert got.dtype == (dtype if name == "error" else torch.float32)
        rounding = torch.finfo(dtype).eps * e.abs().max()
        assert (got - e).abs().max() <= 2 * (s - e).abs().max() + rounding, name


@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes_may_differ(device, target):
    v, i, W, b, t = make((5, 3, 9, 20), torch.float32, device)
    leaves = [v, W.bfloat16(), b, t.to(target)]
    for leaf in leaves:
        leaf.requires_grad_()
    sse, error, dots = squared_error(leaves[0], i, *leaves[1:])
    assert (sse.dtype, error.dtype, dots.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    gradients = torch.autograd.grad(sse.sum(), leaves)
    assert [g.dtype for g in gradients] == [leaf.dtype for leaf in leaves]


@pytest.mark.parametrize("index", [-1, 9, 2**40])
@pytest.mark.parametrize("K", [5, 300])
def test_kernel_takes_a_row_that_does_not_exist_for_zeros(device, index, K, monkeypatch):
    v, i, W, b, target = make((4, K, 9, 70), device=device)
    if not use_triton(W):
        pytest.skip("a CPU refuses the index")
    monkeypatch.setattr("fastsae_kernels.loss.check_indices", lambda indices, F: None)
    got = squared_error(v, i.masked_fill(i < 3, index), W, b, target)
    padded = torch.cat([W, torch.zeros_like(W[:1])])
    expected = squared_error(v, i.masked_fill(i < 3, 9), padded, b, target)
    for one, two in zip(got, expected, strict=True):
        assert torch.equal(one, two)


@pytest.mark.filterwarnings("ignore:invalid value")  # of numpy, in the interpreter
@pytest.mark.parametrize("K", [3, 300])
def test_nan_and_infinity_stay_in_their_token(device, K):
    v, i, W, b, target = make((4, K, 9, 33), device=device)
    v[1, 0], target[2, 5] = float("inf"), float("nan")
    sse, error, dots = squared_error(v, i, W, b, target)
    assert sse.tolist()[1] == float("inf") and error[1].isinf().all()
    assert sse.isnan().tolist() == [False, False, True, False]
    assert error.isnan().sum() == 1 and dots[2].isnan().all()
    assert dots[0::3].isfinite().all() and error[0::3].isfinite().all()


@pytest.mark.parametrize("K", [5, 300])
def test_repeats_add_up(device, K):
    v, i, W, b, target = make((3, K, 9, 70), torch.float64, device)
    one = squared_error(v, torch.full_like(i, 4), W, b, target)
    total = v.sum(1, keepdim=True)
    other = squared_error(total, torch.full_like(i[:, :1], 4), W, b, target)
    torch.testing.assert_close(one[0], other[0])
    torch.testing.assert_close(one[2], other[2].expand_as(i))


def test_gradients(device):
    v, i, W, b, t = make((3, 2, 4, 3), torch.float64, device)
    leaves = [leaf.requires_grad_() for leaf in (v, W, b, t)]

    def sse(v, W, b, t):
        return squared_error(v, i, W, b, t)[0]

    assert gradcheck(sse, leaves)
    assert gradgradcheck(sse, leaves, fast_mode=True)


@settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(shape=st.tuples(*[st.integers(0, 9)] * 2, st.integers(1, 40), st.integers(1, 70)))
def test_any_shape(device, shape):
    args = make(shape, torch.float64, device)
    for got, expected in zip(squared_error(*args), squared_error_reference(*args), strict=True):
        torch.testing.assert_close(got, expected)


def test_same_bits_twice_and_any_strides(device):
    args = make((6, 4, 9, 10), device=device)
    strided = [torch.stack([t, t], dim=-1)[..., 0] for t in args]
    for a, b in zip(squared_error(*args), squared_error(*strided), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"W": torch.ones(5)}, "W must be floating point of shape"),
        ({"i": torch.zeros(3, 2)}, "indices must be int32 or int64"),
        ({"i": torch.full((3, 2), 5)}, r"indices must lie in \[0, 5\), got 5 to 5"),
        ({"v": torch.ones(3, 1)}, "values must be floating point of the shape of indices"),
        ({"t": torch.ones(3, 5)}, r"target must be floating point of shape \[3, 4\]"),
        (
            {"b": torch.ones(5)},
            r"b must be floating point of shape \[4\], got torch.float32 of shape \[5\]",
        ),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    good = {"v": torch.ones(3, 2), "i": torch.zeros(3, 2, dtype=torch.int64)}
    good |= {"W": torch.ones(5, 4), "b": torch.ones(4), "t": torch.ones(3, 4)}
    with pytest.raises(ValueError, match=message):
        squared_error(*({**good, **changes}[name] for name in "viWbt"))
