from importlib import import_module
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from fastsae_kernels import _launch, encode_topk_batch, topk_batch
from fastsae_kernels import product as product_module
from fastsae_kernels.testing import assert_no_worse
from fastsae_kernels.topk import By
from fastsae_kernels.topk_batch import Guess, encode_topk_batch_reference, topk_batch_reference

from .parametrize import BY, each_by, pairwise

DTYPES = torch.float32, torch.bfloat16, torch.float16
SHAPES = [  # N, D, F, k_total
    (1, 1, 1, 1),
    (7, 33, 20, 21),
    (6, 64, 70, 2),  # more than two small blocks
    (13, 3, 9, 30),  # not every row is in the small sample
    (0, 8, 20, 0),
    (4, 8, 20, 0),
]
CHUNKS = 1, 3, 1000
NAN, INF = float("nan"), float("inf")


def integers(shape, device, dtype=torch.float32):
    """x, W_enc, b_enc with products that every dtype and every order of summation gets exactly."""
    N, D, F, _ = shape
    return [torch.randint(-1, 2, s).to(device, dtype) for s in ((N, D), (F, D), (F,))]


def separated(shape, device, dtype, by):
    """x, W_enc, b_enc, and a k_total that rounding cannot exchange entries across."""
    N, D, F, k = shape
    x, W, b = (torch.randn(s).to(device, dtype) for s in ((50 * N, D), (F, D), (F,)))
    h = torch.addmm(b.double(), x.double(), W.double().t())
    rank = h.abs() if by == "abs" else h.relu()
    if not k:
        return x[:N], W, b, 0
    level = rank.flatten().sort(descending=True).values[50 * k - 1]
    clear = ((rank - level).abs() > 2 * torch.finfo(dtype).eps * (level + 3)).all(1)
    x, rank = x[clear][:N], rank[clear][:N]
    k = int((rank > level).sum())
    assert len(x) == N and k
    return x, W, b, k


def assert_encoded_as_reference(
    x, W, b, k_total, by: By = "value", hint: torch.Tensor | float = 0.0
):
    got = encode_topk_batch(x, W, b, k_total, by, hint)
    for a, e in zip(got, encode_topk_batch_reference(x, W, b, k_total, by), strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0)
    return got


def assert_as_reference(pre, k_total, by: By = "value"):
    got = topk_batch(pre, k_total, by)
    for a, e in zip(got, topk_batch_reference(pre, k_total, by), strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0)
    return got


@pytest.fixture(autouse=True)
def small_blocks_and_samples(monkeypatch):
    """The modules by their names, which in the package are those of functions."""
    monkeypatch.setattr("fastsae_kernels._encode_above_kernel.BLOCK", 32)
    monkeypatch.setattr(import_module("fastsae_kernels.topk_batch"), "SAMPLE", 4)


@pytest.fixture(params=CHUNKS)
def chunks(request, monkeypatch):
    """Chunks of so many tokens, of 20 latents in float32."""
    size = 20 * 4 * request.param
    monkeypatch.setattr("fastsae_kernels._launch.buffer_bytes", lambda device: size)


@pairwise(shape=SHAPES, dtype=DTYPES, by=BY)
def test_encoding_and_gradients(device, shape, dtype, by):
    *inputs, k = separated(shape, device, dtype, by)
    assert_no_worse(
        lambda x, W, b: encode_topk_batch(x, W, b, k, by),
        lambda x, W, b: encode_topk_batch_reference(x, W, b, k, by),
        *inputs,
    )


@pairwise(shape=SHAPES, dtype=DTYPES, by=BY)
def test_values_places_and_gradient(device, shape, dtype, by):
    N, _, F, k = shape
    pre = torch.randn(N, F).to(device, dtype)
    assert_no_worse(
        lambda pre: topk_batch(pre, k, by), lambda pre: topk_batch_reference(pre, k, by), pre
    )


@pairwise(shape=SHAPES, dtype=DTYPES[:2], by=BY)
def test_ties_go_to_the_lowest_token_and_latent(device, shape, dtype, by):
    x, W, b = integers(shape, device, dtype)
    for k in {shape[3], shape[3] // 2, shape[0] * shape[2]}:
        assert_encoded_as_reference(x, W, b, k, by)
        assert_as_reference(torch.addmm(b, x, W.t()), k, by)


@pairwise(chunks=CHUNKS, hint=[1e-9, 2.0, INF, NAN], by=BY, indirect=["chunks"])
def test_a_hint_changes_nothing(device, chunks, hint, by):
    """Too low, right, at a tie, too high, and nonsense; the list is cut where it grows too long."""
    x, W, b = integers((10, 9, 20, 0), device)
    assert_encoded_as_reference(x, W, b, 1, by, hint)
    assert_encoded_as_reference(x, W, b, 30, by, torch.tensor(hint, device=device))


@each_by
def test_a_good_hint_saves_the_look_at_some_rows(device, by, monkeypatch):
    x, W, b = integers((20, 9, 20, 0), device)
    found = encode_topk_batch(x, W, b, 40, by)
    least = found.values[found.listed].abs().min()
    rows = []

    def product(x, W, b):
        rows.append(len(x))
        return product_module.product(x, W, b)

    for module in ("listing", "topk_batch"):
        monkeypatch.setattr(import_module(f"fastsae_kernels.{module}"), "product", product)
    assert_encoded_as_reference(x, W, b, 40, by, 0.9 * least)
    assert rows == [20]
    assert_encoded_as_reference(x, W, b, 40, by)
    assert rows[1:3] == [4, 20]


@pairwise(
    chunks=CHUNKS, kind=["block", "negative", "zeros", "constant"], by=BY, indirect=["chunks"]
)
def test_hard_batches(device, chunks, kind, by):
    """Rows that differ, few or no positive entries, and one tie: fewer than asked for, or all."""
    pre = torch.randn(12, 20)
    if kind == "block":
        pre[3] += 10
        pre[6:] -= 10
    elif kind == "negative":
        pre = -pre.abs() - 0.1
    elif kind == "zeros":
        pre = torch.tensor([0.0, -0.0])[torch.randint(2, (12, 20))]
    else:
        pre.fill_(1.5)
    W, b = torch.eye(20, device=device), torch.zeros(20, device=device)
    for k in (9, 240):
        assert_as_reference(pre.to(device), k, by)
        for hint in (0.0, 1e-9):
            assert_encoded_as_reference(pre.to(device), W, b, k, by, hint)


@each_by
def test_a_chunk_raises_a_hint_that_is_too_low(device, by, monkeypatch):
    listed, listing = [], import_module("fastsae_kernels.listing")

    def list_above(*args):
        lists = original(*args)
        listed.append(len(lists[0]))
        return lists

    original = listing.list_above
    monkeypatch.setattr(listing, "list_above", list_above)
    monkeypatch.setattr("fastsae_kernels._launch.buffer_bytes", lambda device: 100 * 20 * 4)
    W, b = torch.eye(20, device=device), torch.zeros(20, device=device)
    x = torch.rand(500, 20)
    if by == "abs":
        x[::2] *= -1
    assert_encoded_as_reference(x.to(device), W, b, 1000, by, 1e-9)
    assert listed[0] == 100 * 20 and len(listed) == 5
    # The next chunks have as many as stayed of the first: both are counts, with their deviations.
    stayed, _ = Guess(1e-9, adapts=True).limits(1000, 1 / 5)
    assert all(abs(one - stayed) < 5 * (2 * stayed) ** 0.5 for one in listed[1:4])
    listed.clear()
    x[:100] += x[:100].sign()  # the others have too few above the raised guess, and a new one
    assert_encoded_as_reference(x.to(device), W, b, 3000, by, 1e-9)
    assert len(listed) == 10


def test_fewer_positive_than_asked_for(device):
    pre = torch.tensor([[-1.0, 0.0, 2.0], [NAN, 1.0, -3.0]], device=device)
    values, tokens, latents = assert_as_reference(pre, 5)
    assert values.tolist() == [2, 1, 0, 0, 0]
    assert tokens.tolist() == [0, 1, 0, 0, 0] and latents.tolist() == [2, 1, 0, 0, 0]
    values, _, _ = assert_as_reference(pre, 3, "abs")
    assert values.tolist() == [-1, 2, -3]


@each_by
def test_nan_is_never_active(device, by):
    x, W, b = integers((4, 8, 20, 0), device)
    x[2, 5], b[3], b[4] = NAN, NAN, INF
    for k in (1, 3, 10, 80):
        pre, indices, count = assert_encoded_as_reference(x, W, b, k, by)
        assert count[2] == 0 and not pre.isnan().any() and not (indices == 3).any()
        assert_as_reference(torch.addmm(b, x, W.t()), k, by)
    pre, *_, least = assert_encoded_as_reference(x[2:3], W, b, 5, by)
    assert pre.tolist() == [[0]] and least == 0


@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data(), N=st.integers(1, 30), F=st.integers(1, 40), by=st.sampled_from(BY))
def test_any_batch(device, data, N, F, by):
    k = data.draw(st.integers(0, N * F))
    pre = (torch.randint(-3, 4, (N, F)) * torch.rand(N, 1)).to(device)
    dtype = data.draw(st.sampled_from(DTYPES))
    assert_as_reference(pre.to(dtype), k, by)
    hint, rows = data.draw(st.sampled_from([0.0, 1e-9, 0.5, 2.0])), data.draw(st.integers(1, 30))
    with patch.object(_launch, "buffer_bytes", lambda device: rows * F * 4):
        assert_encoded_as_reference(pre, torch.eye(F).to(pre), pre.new_zeros(F), k, by, hint)


@each_by
def test_gradcheck(device, by):
    x, W, b, k = separated((3, 2, 4, 5), device, torch.float64, by)
    leaves = [t.requires_grad_() for t in (x, W, b)]
    for check in (gradcheck, gradgradcheck):
        assert check(lambda x, W, b: encode_topk_batch(x, W, b, k, by)[0], leaves, fast_mode=True)
    pre = torch.randn(3, 4, dtype=torch.float64).to(device).requires_grad_()
    assert gradcheck(lambda pre: topk_batch(pre, 8, by)[0], pre, fast_mode=True)


def test_same_bits_twice_and_any_strides(device):
    x, W, b = (t.to(device) for t in (torch.randn(9, 7), torch.randn(7, 50), torch.randn(100)))
    x, W, b = x.t()[:, ::2], W.t()[:, :5], b[::2]
    first = encode_topk_batch(x, W, b, 60)
    for again in (
        encode_topk_batch(x, W, b, 60),
        encode_topk_batch(x.contiguous(), W.contiguous(), b.contiguous(), 60),
    ):
        for one, two in zip(first, again, strict=True):
            assert torch.equal(one, two)
    assert_as_reference(torch.randn(60, 4).to(device).t(), 37)


@pytest.mark.parametrize(
    ("pre", "k_total", "by", "message"),
    [
        (torch.ones(3), 1, "value", r"pre must be floating point of shape \[any, any\]"),
        (torch.ones(3, 4), 13, "value", r"k_total must be between 0 and 3 \* 4 = 12, got 13"),
        (torch.ones(3, 4), 1, "size", 'by must be "value" or "abs", got \'size\''),
    ],
)
def test_wrong_arguments_of_the_choice_are_named(pre, k_total, by, message):
    with pytest.raises(ValueError, match=message):
        topk_batch(pre, k_total, by)


def test_without_latents(device):
    pre, x, W = (torch.ones(size).to(device) for size in ((3, 0), (3, 8), (0, 8)))
    assert [t.tolist() for t in topk_batch(pre, 0)] == [[], [], []]
    values, indices, count = encode_topk_batch(x, W, W[:, 0], 0)
    assert values.tolist() == indices.tolist() == [[0]] * 3
    assert count.tolist() == [0] * 3
