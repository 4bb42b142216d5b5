import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from fastsae_kernels import decode, encode_topk, gather_dot, scatter_outer
from fastsae_kernels._launch import use_triton
from fastsae_kernels.latent_major import latent_major, sum_runs
from fastsae_kernels.sparse import decode_reference, gather_dot_reference, scatter_outer_reference
from fastsae_kernels.testing import assert_no_worse

SHAPES = [  # N, K, F, D
    (1, 1, 1, 1),
    (7, 3, 20, 33),  # nothing is a power of two
    (6, 8, 9, 128),
    (5, 4, 9, 1030),  # D spans two blocks
    (0, 4, 8, 16),
    (3, 0, 8, 16),
]
CASES = [
    *((shape, torch.float32) for shape in SHAPES),
    *((shape, dtype) for shape in SHAPES[1:4] for dtype in (torch.bfloat16, torch.float16)),
]
each_case = pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
HYPOTHESIS = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


def make(shape, dtype=torch.float32, device="cpu", index=torch.int64):
    """values, indices (repeats allowed), x, W"""
    N, K, F, D = shape
    values, x, W = (torch.randn(s).to(device, dtype) for s in ((N, K), (N, D), (F, D)))
    return values, torch.randint(F, (N, K), device=device).to(index), x, W


@each_case
def test_decode(shape, dtype, device):
    v, i, _, W = make(shape, dtype, device)
    assert_no_worse(decode, decode_reference, v, i, W)


@each_case
def test_gather_dot(shape, dtype, device):
    _, i, x, W = make(shape, dtype, device)
    assert_no_worse(gather_dot, gather_dot_reference, x, i, W)


@each_case
def test_scatter_outer(shape, dtype, device):
    v, i, x, W = make(shape, dtype, device)
    assert_no_worse(scatter_outer, scatter_outer_reference, v, i, x, W.shape[0])


@pytest.mark.parametrize("other", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtypes_may_differ(device, dtype, other):
    v, i, x, W = make((7, 3, 20, 33), dtype, device)
    v, x = (t.to(other).requires_grad_() for t in (v, x))
    for out, like, leaf in (
        (decode(v, i, W), W, v),
        (gather_dot(x, i, W), x, x),
        (scatter_outer(v, i, W[:7], 20), W, v),
    ):
        (gradient,) = torch.autograd.grad(out.sum(), leaf)
        assert (out.dtype, gradient.dtype) == (like.dtype, leaf.dtype)


def test_one_latent_in_many_tokens(device):
    v, i, x, _ = make((200, 2, 5, 3), device=device)  # 200 of one latent: a whole chunk
    i[:, 0] = 3
    assert_no_worse(scatter_outer, scatter_outer_reference, v, i, x, 5)


def test_int32_indices_and_any_strides(device):
    v, i, x, W = make((6, 4, 9, 10), device=device)
    strided = [torch.stack([t, t], dim=2)[:, :, 0] for t in (v, i.int(), x, W)]
    assert not any(t.is_contiguous() for t in strided)
    v2, i2, x2, W2 = strided
    assert torch.equal(decode(v2, i2, W2), decode(v, i, W))
    assert torch.equal(gather_dot(x2, i2, W2), gather_dot(x, i, W))
    assert torch.equal(scatter_outer(v2, i2, x2, 9), scatter_outer(v, i, x, 9))


def test_same_bits_twice(device):
    v, i, x, W = make((10, 8, 6, 33), device=device)
    assert torch.equal(decode(v, i, W), decode(v, i, W))
    assert torch.equal(gather_dot(x, i, W), gather_dot(x, i, W))
    assert torch.equal(scatter_outer(v, i, x, 6), scatter_outer(v, i, x, 6))


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_first_and_second_derivatives(device, check):
    v, _, x, W = make((2, 2, 3, 2), torch.float64, device)
    i = torch.tensor([[2, 0], [2, 2]], device=device)
    v, x, W = (t.requires_grad_() for t in (v, x, W))
    assert check(lambda v, W: decode(v, i, W), (v, W), fast_mode=True)
    assert check(lambda x, W: gather_dot(x, i, W), (x, W), fast_mode=True)
    assert check(lambda v, x: scatter_outer(v, i, x, 3), (v, x), fast_mode=True)


def test_no_gradient_where_none_is_asked_for(device):
    v, i, x, W = make((3, 2, 5, 4), device=device)
    out = decode(v, i, W.requires_grad_()).sum() + gather_dot(x, i, W).sum()
    out.backward()
    assert W.grad is not None and v.grad is None and x.grad is None


@settings(max_examples=10, derandomize=True, **HYPOTHESIS)
@given(shape=st.tuples(*[st.integers(0, 9)] * 2, st.integers(1, 20), st.integers(1, 70)))
def test_any_shape(device, shape):
    v, i, x, W = make(shape, torch.float64, device)
    F = shape[2]
    torch.testing.assert_close(decode(v, i, W), decode_reference(v, i, W))
    torch.testing.assert_close(gather_dot(x, i, W), gather_dot_reference(x, i, W))
    torch.testing.assert_close(scatter_outer(v, i, x, F), scatter_outer_reference(v, i, x, F))


def test_latent_major_keeps_token_order():
    indices = torch.tensor([[2, 0], [2, 2], [0, 3]])
    entry, token, latent, start = latent_major(indices, 5)
    assert entry.tolist() == [1, 4, 0, 2, 3, 5]
    assert token.tolist() == [0, 2, 0, 1, 1, 2]
    assert latent.tolist() == [0, 0, 2, 2, 2, 3]
    assert start.tolist() == [0, 2, 2, 5, 6, 6]


def test_sum_runs_of_some_rows_are_those_of_all(device):
    values, indices, x, _ = make((300, 3, 20, 33), device=device)  # 45 entries a latent
    indices[:, 0] = 7  # and one with several chunks
    runs = latent_major(indices, 20)
    every = scatter_outer(values, indices, x, 20)
    for rows in slice(3, 11), slice(19, 20), slice(5, 5):
        assert torch.equal(sum_runs(values.flatten()[runs.entry], x, runs, rows), every[rows])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"W": torch.ones(5)}, "W must be floating point of shape"),
        ({"W": torch.ones(5, 4, dtype=torch.int64)}, "W must be floating point"),
        ({"i": torch.zeros(3, 2)}, "indices must be int32 or int64"),
        ({"i": torch.zeros(3, dtype=torch.int64)}, "indices must be int32 or int64 of shape"),
        ({"v": torch.ones(3, 1)}, "values must be floating point of the shape of indices"),
        ({"v": torch.ones(3, 2, dtype=torch.int64)}, "values must be floating point"),
        ({"x": torch.ones(2, 4)}, "x must be floating point of shape"),
        ({"i": torch.full((3, 2), 5)}, r"indices must lie in \[0, 5\), got 5 to 5"),
        ({"i": torch.full((3, 2), -1)}, r"indices must lie in \[0, 5\), got -1 to -1"),
        ({"W": torch.ones(5, 4, device="meta")}, "W must be on the device of .*, got meta"),
        ({"x": torch.ones(3, 4, device="meta")}, "be on the device of"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    good = {"v": torch.ones(3, 2), "i": torch.zeros(3, 2, dtype=torch.int64)}
    good |= {"x": torch.ones(3, 4), "W": torch.ones(5, 4)}
    v, i, x, W = ({**good, **changes}[name] for name in "vixW")
    uses = {
        decode: ((v, i, W), "viW"),
        gather_dot: ((x, i, W), "xiW"),
        scatter_outer: ((v, i, x, 5), "vix"),
    }
    for op, (args, names) in uses.items():
        if set(changes) <= set(names):
            with pytest.raises(ValueError, match=message):
                op(*args)


@pytest.mark.parametrize("index", [-1, 5, 2**31 - 1])
def test_kernels_read_no_row_that_does_not_exist(device, index, monkeypatch):
    """A GPU takes it for a row of zeros; a CPU, which looks, refuses it."""
    v, i, x, W = make((3, 2, 5, 4), device=device)
    i[1, 0] = index
    if not use_triton(v):
        with pytest.raises(ValueError, match="indices must lie in"):
            decode(v, i, W)
        return
    monkeypatch.setattr("fastsae_kernels.sparse.check_indices", lambda indices, F: None)
    exists = torch.ones_like(i, dtype=torch.bool)
    exists[1, 0] = False
    zeroed, kept = v * exists, i.where(exists, 0)
    assert torch.equal(decode(v, i, W), decode(zeroed, kept, W))
    assert torch.equal(gather_dot(x, i, W), gather_dot(x, kept, W) * exists)
    assert torch.equal(scatter_outer(v, i, x, 5), scatter_outer(zeroed, kept, x, 5))


def test_width_of_x_must_be_that_of_W():
    indices = torch.zeros(3, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"x must be floating point of shape \[3, 4\]"):
        gather_dot(torch.ones(3, 5), indices, torch.ones(5, 4))


def test_a_backward_pass_sorts_its_indices_once(monkeypatch):
    sorted_indices = []

    def counted(indices, F):
        sorted_indices.append(indices.clone())
        return latent_major(indices, F)

    module = sys.modules["fastsae_kernels.latent_major"]  # the package exports the function
    monkeypatch.setattr(module, "latent_major", counted)
    x, W = torch.randn(4, 5), torch.randn(7, 5, requires_grad=True)
    b = torch.zeros(7, requires_grad=True)
    for steps in (1, 2):
        values, indices = encode_topk(x, W, b, 2)
        decode(values, indices, W).square().sum().backward()
        assert len(sorted_indices) == steps
    array = np.array([[1, 2], [2, 0]])
    indices = torch.from_numpy(array)
    before = scatter_outer(torch.ones(2, 2), indices, torch.eye(2), 4)
    array[0, 0] = 3  # which torch does not see
    after = scatter_outer(torch.ones(2, 2), indices, torch.eye(2), 4)
    assert before[1, 0] == after[3, 0] == 1 and before[3, 0] == after[1, 0] == 0
