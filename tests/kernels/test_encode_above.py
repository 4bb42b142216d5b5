import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fastsae_kernels import encode_above
from fastsae_kernels.encode_above import encode_above_reference
from fastsae_kernels.testing import assert_no_worse
from fastsae_kernels.topk import By

from .parametrize import BY, each_by, pairwise

DTYPES = torch.float32, torch.bfloat16, torch.float16
SHAPES = [  # N, D, F
    (1, 1, 1),
    (7, 33, 20),
    (6, 64, 70),  # more than two small blocks
    (0, 8, 20),
]
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Of the kernel; the module by its name, which in the package is the function's."""
    monkeypatch.setattr("fastsae_kernels._encode_above_kernel.BLOCK", 32)


def integers(shape, device, dtype=torch.float32):
    """x, W_enc, b_enc with products that every dtype and every order of summation gets exactly."""
    N, D, F = shape
    return [torch.randint(-1, 2, s).to(device, dtype) for s in ((N, D), (F, D), (F,))]


def separated(shape, device, dtype, by):
    """x, W_enc, b_enc and thresholds that no rounding can put an entry on the other side of."""
    N, D, F = shape
    x, W, b = (torch.randn(s).to(device, dtype) for s in ((N, D), (F, D), (F,)))
    h = torch.addmm(b.double(), x.double(), W.double().t())
    rank = h.abs() if by == "abs" else h
    if not N:
        return x, W, b, torch.ones(F, device=device)
    scale = h.square().mean().sqrt()  # twice that is exceeded by few enough to be summed well
    steps = torch.linspace(0.5, 2, 101, dtype=torch.float64, device=device)[:, None, None] * scale
    distance = (rank - steps).abs().amin(1)
    best = distance.argmax(0)
    margin = 8 * torch.finfo(dtype).eps * (1 + h.abs().amax(0))
    assert (distance.gather(0, best[None])[0] > margin).all()
    return x, W, b, steps[best, 0, 0].float()


def assert_as_reference(x, W, b, threshold, by: By = "value") -> tuple[Tensor, Tensor, Tensor]:
    got = encode_above(x, W, b, threshold, by)
    for a, e in zip(got, encode_above_reference(x, W, b, threshold, by), strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0)
    return got


@pairwise(shape=SHAPES, dtype=DTYPES, by=BY)
def test_entries_and_gradients(device, shape, dtype, by):
    assert_no_worse(
        lambda x, W, b, t: encode_above(x, W, b, t, by),
        lambda x, W, b, t: encode_above_reference(x, W, b, t, by),
        *separated(shape, device, dtype, by),
    )


@pairwise(shape=SHAPES, dtype=DTYPES, by=BY, threshold=[1, 0.0, -2.0, "each"])
def test_entries_at_the_threshold_are_not_above_it(device, shape, dtype, threshold, by):
    x, W, b = integers(shape, device, dtype)
    if threshold == "each":
        threshold = torch.randint(-2, 3, (shape[2],), device=device).float()
    assert_as_reference(x, W, b, threshold, by)


def test_whole_blocks(device, monkeypatch):
    monkeypatch.undo()
    for F in (2048, 4099):
        x, W, b = integers((3, 5, F), device)
        assert_as_reference(x, W, b, 2.0)


@each_by
def test_none_and_all(device, by):
    x, W, b = integers((5, 9, 30), device)
    pre, indices, count = assert_as_reference(x, W, b, 100.0, by)
    assert pre.tolist() == indices.tolist() == [[0]] * 5 and count.tolist() == [0] * 5
    pre, indices, count = assert_as_reference(x, W, b, -100.0, by)
    assert torch.equal(pre, torch.addmm(b, x, W.t())) and count.tolist() == [30] * 5
    assert torch.equal(indices, torch.arange(30, device=device).expand(5, -1))


def test_thresholds_are_not_rounded_to_half_precision(device):
    """1 is above 1 - 2^-12, which bfloat16 does not have."""
    x = torch.ones(1, 1, device=device, dtype=torch.bfloat16)
    b = torch.zeros(1, device=device, dtype=torch.bfloat16)
    for number in (1 - 2**-12, torch.tensor(1 - 2**-12, device=device)):
        assert assert_as_reference(x, x, b, number)[2].tolist() == [1]
    assert assert_as_reference(x.double(), x.double(), b.double(), 1 - 2**-50)[2].tolist() == [1]


@each_by
def test_nan_exceeds_nothing(device, by):
    x, W, b = integers((4, 8, 20), device)
    x[2, 5], b[3] = NAN, NAN
    pre, indices, count = assert_as_reference(x, W, b, 0.0, by)
    assert count[2] == 0 and pre.isfinite().all() and not (indices == 3).any()
    b[3], b[4] = INF, -INF
    threshold = torch.zeros(20, device=device)
    threshold[7] = NAN
    _, indices, count = assert_as_reference(x, W, b, threshold, by)
    assert count[2] == 0 and (indices[[0, 1, 3]] == 3).any(1).all() and not (indices == 7).any()


@pytest.mark.parametrize("tokens", [0, 3, 100])
def test_chunks_of_tokens(device, tokens, monkeypatch):
    """The buffer holds so many tokens (one at least): nothing else changes."""
    x, W, b = integers((7, 9, 30), device)
    whole = encode_above(x, W, b, 1.0)
    monkeypatch.setattr("fastsae_kernels._launch.buffer_bytes", lambda device: 30 * 4 * tokens)
    for got, expected in zip(encode_above(x, W, b, 1.0), whole, strict=True):
        assert torch.equal(got, expected)


@each_by
def test_gradcheck(device, by):
    x, W, b, threshold = separated((3, 4, 6), device, torch.float64, by)
    leaves = [t.requires_grad_() for t in (x, W, b)]
    for check in (gradcheck, gradgradcheck):
        assert check(
            lambda x, W, b: encode_above(x, W, b, threshold, by)[0], leaves, fast_mode=True
        )


def test_padding_gets_no_gradient_and_entries_of_value_0_do(device):
    W = torch.tensor([[0.0], [-1.0], [2.0]]).to(device).requires_grad_()
    x = torch.tensor([[1.0], [-3.0]]).to(device).requires_grad_()
    b = torch.zeros(3).to(device).requires_grad_()
    pre, indices, count = encode_above(x, W, b, -0.5)
    assert pre.tolist() == [[0, 2], [0, 3]] and indices.tolist() == [[0, 2], [0, 1]]
    pre, indices, count = encode_above(x, W, b, -1.5)
    assert pre.tolist() == [[0, -1, 2], [0, 3, 0]] and count.tolist() == [3, 2]
    pre.sum().backward()
    assert W.grad is not None and x.grad is not None and b.grad is not None
    assert W.grad.flatten().tolist() == [-2, -2, 1]
    assert x.grad.flatten().tolist() == [1, -1]
    assert b.grad.tolist() == [2, 2, 1]


def test_the_threshold_gets_no_gradient(device):
    x, W, b = (t.requires_grad_() for t in integers((4, 8, 20), device))
    threshold = torch.zeros(20, device=device, requires_grad=True)
    encode_above(x, W, b, threshold)[0].sum().backward()
    assert x.grad is not None and threshold.grad is None


def test_same_bits_twice_and_any_strides(device):
    x, W, b = (t.to(device) for t in (torch.randn(9, 7), torch.randn(7, 50), torch.randn(100)))
    threshold = torch.rand(100, device=device)[::2]
    x, W, b = x.t()[:, ::2], W.t()[:, :5], b[::2]
    x, W, b = (t.requires_grad_() for t in (x, W, b))

    def run(x, W, b):
        outs = encode_above(x, W, b, threshold)
        return *outs, *torch.autograd.grad(outs[0].square().sum(), (x, W, b))

    first = run(x, W, b)
    for again in (run(x, W, b), run(x.contiguous(), W.contiguous(), b.contiguous())):
        for one, two in zip(first, again, strict=True):
            assert torch.equal(one, two)


def test_without_latents(device):
    x, W = torch.ones(3, 8).to(device), torch.ones(0, 8).to(device)
    pre, indices, count = encode_above(x, W, W[:, 0], 0.5)
    assert pre.tolist() == indices.tolist() == [[0]] * 3 and count.tolist() == [0] * 3
