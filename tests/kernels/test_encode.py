import pytest
import torch
from torch.autograd import gradcheck

from fastsae_kernels import encode_topk
from fastsae_kernels._encode_kernel import Tiles, can_encode, launch_encode, tiles_for
from fastsae_kernels._launch import use_triton
from fastsae_kernels.encode import encode_topk_reference
from fastsae_kernels.testing import assert_no_worse
from fastsae_kernels.topk import topk_indices, topk_reference

from .parametrize import each_by

SHAPES = [  # N, D, F, k
    (1, 1, 1, 1),
    (7, 33, 20, 3),
    (6, 64, 70, 8),
    (5, 3, 20, 20),
    (0, 8, 20, 4),
]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "N{}-D{}-F{}-k{}".format(*s))


def make(shape, device, dtype=torch.float32):
    """x, W_enc, b_enc"""
    N, D, F, _ = shape
    return [torch.randn(size).to(device, dtype) for size in ((N, D), (F, D), (F,))]


def integers(shape, device, dtype=torch.float32):
    """The same, with products that every dtype and every order of summation gets exactly."""
    N, D, F, _ = shape
    return [torch.randint(-1, 2, s).to(device, dtype) for s in ((N, D), (F, D), (F,))]


def separated(shape, device, dtype, by):
    """The same, only tokens whose k + 1 largest pre-activations no rounding can exchange."""
    N, D, F, k = shape
    x, W, b = make((50 * N, D, F, k), device, dtype)
    h = torch.addmm(b.double(), x.double(), W.double().t())
    ranks = (h.abs() if by == "abs" else h).topk(min(k + 1, F)).values
    gaps = -ranks.diff(dim=1) > 8 * torch.finfo(dtype).eps * h.abs().amax(1, keepdim=True)
    x = x[gaps.all(1)][:N]
    assert len(x) == N
    return x, W, b


@each_by
@each_shape
def test_values_indices_and_gradients(device, shape, by):
    k = shape[3]
    assert_no_worse(
        lambda x, W, b: encode_topk(x, W, b, k, by),
        lambda x, W, b: encode_topk_reference(x, W, b, k, by),
        *make(shape, device),
    )


@each_by
def test_bfloat16(device, by):
    assert_no_worse(
        lambda x, W, b: encode_topk(x, W, b, 3, by),
        lambda x, W, b: encode_topk_reference(x, W, b, 3, by),
        *separated((7, 33, 20, 3), device, torch.bfloat16, by),
    )


@each_by
@each_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ties_go_to_the_lowest_latent(device, shape, dtype, by):
    x, W, b = integers(shape, device, dtype)
    for got, expected in zip(
        encode_topk(x, W, b, shape[3], by),
        encode_topk_reference(x, W, b, shape[3], by),
        strict=True,
    ):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("tokens", [0, 3, 100])
def test_chunks_of_tokens(device, tokens, monkeypatch):
    """The buffer holds so many tokens (one at least): nothing else changes."""
    x, W, b = integers((7, 9, 30, 5), device)
    whole = encode_topk(x, W, b, 5)
    monkeypatch.setattr("fastsae_kernels._launch.buffer_bytes", lambda device: 30 * 4 * tokens)
    for got, expected in zip(encode_topk(x, W, b, 5), whole, strict=True):
        assert torch.equal(got, expected)


@pytest.fixture
def tf32():
    """Products of float32 may be rounded to tf32, as tensor cores need it."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    yield
    matmul.fp32_precision = before


@pytest.fixture
def encoder_kernel(device, monkeypatch, tf32):
    """Our product with the groups' maxima, in small tiles, in place of cuBLAS or torch."""
    if not use_triton(torch.empty(0, device=device)):
        pytest.skip("the torch path has no choice of products")
    monkeypatch.setattr("fastsae_kernels.encode.ENCODER", "triton")
    tiles = Tiles(16, 32, 32, 4, 2)
    monkeypatch.setattr("fastsae_kernels._encode_kernel.tiles_for", lambda x: tiles)
    monkeypatch.setattr("fastsae_kernels._encode_kernel.BAND", 2)
    launched = []

    def launch(*arguments):
        launched.append(arguments)
        return launch_encode(*arguments)

    monkeypatch.setattr("fastsae_kernels._encode_kernel.launch_encode", launch)
    yield
    assert launched


@each_by
@pytest.mark.parametrize(
    "shape",  # one entry; odd; more tiles of tokens than a band; whole tiles; one group per latent
    [(1, 1, 1, 1), (7, 33, 70, 8), (36, 3, 33, 9), (5, 32, 64, 16), (3, 20, 32, 8)],
    ids=lambda s: "N{}-D{}-F{}-k{}".format(*s),
)
def test_the_encoder_kernel(device, encoder_kernel, shape, by):
    """Exact at ties, and where fewer latents than a tile exist."""
    x, W, b = integers(shape, device)
    for got, expected in zip(
        encode_topk(x, W, b, shape[3], by),
        encode_topk_reference(x, W, b, shape[3], by),
        strict=True,
    ):
        assert torch.equal(got, expected)


@each_by
def test_the_encoder_kernel_on_hard_rows(device, encoder_kernel, by):
    """NaN, all negative, constant, and large neighbors that overflow the room for candidates."""
    W = torch.eye(128, device=device)
    x = torch.randn(6, 128).to(device)
    x[0, 5] = float("nan")
    x[1] = -x[1].abs()
    x[2] = 1.5
    x[3, ::8] += 10  # all of one group in each tile
    x[4, :32] = 7.0
    b = torch.zeros(128, device=device)
    values, indices = encode_topk(x, W, b, 8, by)
    assert values[0].isnan().all(), "NaN times 0 is NaN in every latent"
    expected, places = encode_topk_reference(x[1:], W, b, 8, by)
    assert torch.equal(values[1:], expected) and torch.equal(indices[1:], places)


def test_the_encoder_kernel_needs_groups(device, tf32):
    """Fewer groups than k cannot bound the k-th largest: then cuBLAS multiplies."""
    x = torch.empty(4, 64, device=device)
    groups = 8 * (1024 // tiles_for(x).f)
    assert can_encode(x, 1024, groups)
    assert not can_encode(x, 1024, groups + 1)
    assert not can_encode(x.double(), 1024, 1)
    assert can_encode(x.bfloat16(), 1 << 20, 128)


def test_the_encoder_kernel_rounds_no_more_than_asked(device):
    assert torch.backends.cuda.matmul.fp32_precision != "tf32"
    assert not can_encode(torch.empty(4, 64, device=device), 1024, 1)


@each_by
def test_inactive_entries_get_no_gradient(device, by):
    W = torch.tensor([[0.0], [-1.0], [2.0]]).to(device).requires_grad_()
    x = torch.tensor([[1.0], [3.0]]).to(device).requires_grad_()
    b = torch.zeros(3).to(device).requires_grad_()
    values, _ = encode_topk(x, W, b, 3, by)
    values.sum().backward()
    assert W.grad is not None and x.grad is not None and b.grad is not None
    signed = by == "abs"
    assert W.grad.flatten().tolist() == [0, 4 if signed else 0, 4]
    assert x.grad.flatten().tolist() == [1, 1] if signed else [2, 2]
    assert b.grad.tolist() == [0, 2 if signed else 0, 2]


@each_by
def test_gradients(device, by):
    x, W, b = separated((3, 4, 6, 2), device, torch.float64, by)
    leaves = [t.requires_grad_() for t in (x, W, b)]
    assert gradcheck(lambda x, W, b: encode_topk(x, W, b, 2, by)[0], leaves)


@each_by
def test_shadow_reranks_its_candidates(device, by):
    """With a shadow that is wrong, the choice is the exact one among what the shadow proposes."""
    shape = 4, 16, 100, 5
    x, W, b = integers(shape, device)
    shadow = integers(shape, device)[1].bfloat16()
    values, indices = encode_topk(x, W, b, 5, by, shadow=shadow)
    low = torch.addmm(b.bfloat16(), x.bfloat16(), shadow.t())
    candidates = topk_indices(low, 5 + 8, by, ties="any")
    pre = torch.addmm(b, x, W.t())
    proposed = torch.zeros_like(pre, dtype=torch.bool).scatter(1, candidates, True)
    pre = pre.masked_fill(~proposed, -1e9 if by == "value" else 0.0)
    expected, places = topk_reference(pre, 5, by)
    assert torch.equal(values, expected)
    active = expected != 0
    assert torch.equal(indices[active], places[active])


@each_by
def test_shadow_changes_nothing_where_it_is_good_enough(device, by):
    shape = 5, 32, 40, 4
    x, W, b = separated(shape, device, torch.float32, by)
    leaves = [t.requires_grad_() for t in (x, W, b)]
    exact = encode_topk(x, W, b, 4, by)
    again = encode_topk(x, W, b, 4, by, shadow=W.detach().bfloat16())
    assert torch.equal(exact[1], again[1])
    torch.testing.assert_close(again[0], exact[0])
    for one, two in zip(
        torch.autograd.grad(exact[0].square().sum(), leaves),
        torch.autograd.grad(again[0].square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-4)


def test_shadow_without_tokens(device):
    x, W, b = make((0, 8, 20, 4), device)
    values, indices = encode_topk(x, W, b, 4, shadow=W.bfloat16())
    assert values.shape == indices.shape == (0, 4)


def test_nan_is_never_dropped(device):
    x, W, b = make((4, 8, 20, 3), device)
    x[2, 5] = float("nan")
    for shadow in (None, W.bfloat16()):
        values, _ = encode_topk(x, W, b, 3, shadow=shadow)
        assert values.isnan().any(1).tolist() == [False, False, True, False]


def test_any_strides(device):
    x, W, b = integers((6, 9, 30, 4), device)
    x2, W2, b2 = (torch.stack([t, t], dim=-1)[..., 0] for t in (x, W, b))
    for got, expected in zip(encode_topk(x2, W2, b2, 4), encode_topk(x, W, b, 4), strict=True):
        assert torch.equal(got, expected)


def test_same_bits_twice(device):
    x, W, b = leaves = [t.requires_grad_() for t in make((6, 16, 20, 4), device)]

    def run():
        values, indices = encode_topk(x, W, b, 4)
        return values, indices, *torch.autograd.grad(values.square().sum(), leaves)

    for one, two in zip(run(), run(), strict=True):
        assert torch.equal(one, two)


def test_half_precision_on_a_cpu():
    """Whatever this machine's oneDNN knows."""
    x, W, b = torch.randn(5, 16).half(), torch.randn(40, 16).half(), torch.zeros(40).half()
    values, indices = encode_topk(x, W, b, 4)
    pre = torch.nn.functional.linear(x, W, b)
    assert torch.equal(indices, topk_indices(pre, 4))
    assert torch.equal(values, pre.gather(1, indices).relu())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_transposed_and_strided_arguments(device, dtype):
    x, W, b = (
        t.to(device, dtype) for t in (torch.randn(9, 7), torch.randn(7, 50), torch.randn(100))
    )
    x, W, b = x.t()[:, ::2], W.t()[:, :5], b[::2]
    got = encode_topk(x, W, b, 4)
    expected = encode_topk(x.contiguous(), W.contiguous(), b.contiguous(), 4)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    exact = encode_topk_reference(x.double(), W.double(), b.double(), 4)
    assert torch.equal(got[1], exact[1])
