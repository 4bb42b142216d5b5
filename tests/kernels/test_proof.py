"""bfloat16 candidates on a CPU: the bound on their rounding errors, and what it proves."""

import pytest
import torch

from fastsae_kernels import encode_topk
from fastsae_kernels.encode import encode_topk_reference
from fastsae_kernels.product import product
from fastsae_kernels.proof import (
    bfloat16_pays,
    low_rows,
    proofs_are_likely,
    rounding_bound,
    select_proved,
)
from fastsae_kernels.testing import assert_no_worse

from .parametrize import each_by
from .test_encode import separated


def halfway(*shape):
    """Numbers in the middle between two neighbors in bfloat16, with the largest rounding errors."""
    bits = torch.randn(shape).view(torch.int32) & ~0xFFFF | 0x8000
    return bits.view(torch.float32)


@pytest.fixture(autouse=True)
def on_any_cpu(monkeypatch):
    monkeypatch.setattr("fastsae_kernels.proof.CPU_BF16", "1")


def share_proved(x, W, b, k, by):
    return 1 - len(select_proved(x, W, b, k, by)[2]) / len(x)


OPERANDS = {
    "normal": lambda N, D, F: (torch.randn(N, D), torch.randn(F, D), torch.randn(F)),
    "halfway": lambda N, D, F: (halfway(N, D), halfway(F, D), halfway(F)),
    "one sign": lambda N, D, F: (halfway(N, D).abs(), halfway(F, D).abs(), -halfway(F).abs()),
    "outliers": lambda N, D, F: (
        torch.randn(N, D) * torch.randn(D).exp() ** 3, torch.randn(F, D), torch.zeros(F)
    ),
    "subnormal": lambda N, D, F: (torch.randn(N, D) * 1e-38, torch.randn(F, D), torch.zeros(F)),
    "large": lambda N, D, F: (torch.randn(N, D) * 1e30, torch.randn(F, D), torch.randn(F)),
}  # fmt: skip


@pytest.mark.parametrize("kind", OPERANDS)
@pytest.mark.parametrize("D", [1, 33, 768, 5000])
def test_no_rounding_error_exceeds_the_bound(kind, D):
    x, W, b = OPERANDS[kind](64, D, 200)
    low = product(x.bfloat16(), W.bfloat16(), b.bfloat16()).float()
    exact = torch.addmm(b.double(), x.double(), W.double().t())
    copy = low_rows(W)
    assert torch.equal(copy.rows, W.bfloat16())
    for h, expected in zip(low.unbind(1), exact.unbind(1), strict=True):
        assert ((h - expected).abs() <= rounding_bound(x, x.bfloat16(), b, copy, h)).all()


def equal_to_reference(x, W, b, k, by):
    got = encode_topk(x, W, b, k, by)
    expected = encode_topk_reference(x, W, b, k, by)
    return all(torch.equal(*each) for each in zip(got, expected, strict=True))


@each_by
def test_most_tokens_are_proved(by):
    x, W, _ = separated((200, 256, 2048, 16), "cpu", torch.float32, by)
    W, b = W / W.norm(dim=1, keepdim=True), torch.zeros(len(W))
    assert share_proved(x, W, b, 16, by) > 0.95
    values, indices = encode_topk(x, W, b, 16, by)
    exact, best = encode_topk_reference(x.double(), W.double(), b.double(), 16, by)
    assert torch.equal(indices, best)
    torch.testing.assert_close(values.double(), exact, rtol=1e-5, atol=1e-5)


@each_by
def test_latents_that_bfloat16_does_not_tell_apart(by):
    """More of them than candidates."""
    W, x, b = torch.ones(400, 8) + 1e-4 * torch.rand(400, 1), torch.ones(3, 8), torch.zeros(400)
    assert share_proved(x, W, b, 4, by) == 0
    assert equal_to_reference(x, W, b, 4, by)


@each_by
def test_more_candidates_are_tried_before_fp32(by, monkeypatch):
    """In chunks of eight tokens, of which half need one or two more tries."""
    monkeypatch.setattr("fastsae_kernels._launch.buffer_bytes", lambda device: 8 * 300 * 2)
    x, W, b = torch.zeros(40, 3), torch.zeros(300, 3), torch.zeros(300)
    x[0::4, 0], W[:100, 0] = 1, 1  # a hundred equal latents
    x[1::4, 1], W[:20, 1] = 1, 1  # twenty
    x[2::4, 2], x[3::4, 2], W[:, 2] = 1, -1, torch.arange(300) / 300
    shares = []
    for rounds in ((2,), (2, 8), (2, 8, 60)):
        monkeypatch.setattr("fastsae_kernels.proof.ROUNDS", rounds)
        shares.append(share_proved(x, W, b, 4, by))
        assert equal_to_reference(x, W, b, 4, by)
    assert 0 < shares[0] < shares[1] < shares[2] == 1


def test_where_the_first_chunk_is_not_proved_all_goes_through_fp32(monkeypatch):
    products = []

    def counted(low, *rest):
        products.append(len(low))
        return product(low, *rest)

    monkeypatch.setattr("fastsae_kernels._launch.buffer_bytes", lambda device: 100 * 400 * 2)
    monkeypatch.setattr("fastsae_kernels.proof.product", counted)
    assert equal_to_reference(torch.ones(1000, 8), torch.ones(400, 8), torch.zeros(400), 4, "value")
    assert products == [100]


@each_by
def test_gradients(by):
    x, W, b = separated((9, 32, 300, 4), "cpu", torch.float32, by)
    assert_no_worse(
        lambda x, W, b: encode_topk(x, W, b, 4, by),
        lambda x, W, b: encode_topk_reference(x, W, b, 4, by),
        x, W, b,
    )  # fmt: skip


def test_nan_is_never_dropped():
    """In a token, in one latent, and of either sign."""
    for sign in (1, -1):
        x, W, b = torch.randn(40, 32), torch.randn(300, 32), torch.zeros(300)
        x[2, 5] = W[7, 0] = sign * torch.tensor(float("nan"))
        values, indices = encode_topk(x, W, b, 4)
        assert values[:, 0].isnan().all()
        assert (indices[:, 0] == 7).sum() == 39
    x, W, b = torch.randn(40, 32), torch.randn(300, 32), torch.zeros(300)
    b[9] = float("nan")
    assert (encode_topk(x, W, b, 4)[1][:, 0] == 9).all()


def test_without_tokens():
    values, indices = encode_topk(torch.empty(0, 8), torch.randn(300, 8), torch.zeros(300), 4)
    assert values.shape == indices.shape == (0, 4)


def test_where_it_pays(monkeypatch):
    assert bfloat16_pays(1, 1, 1)
    monkeypatch.setattr("fastsae_kernels.proof.CPU_BF16", "0")
    assert not bfloat16_pays(1024, 4096, 32)
    monkeypatch.setattr("fastsae_kernels.proof.CPU_BF16", None)
    monkeypatch.setattr("fastsae_kernels.proof.has_bf16", lambda: True)
    assert bfloat16_pays(1024, 4096, 32)
    assert not (bfloat16_pays(1023, 4096, 32) or bfloat16_pays(1024, 4095, 32))
    monkeypatch.setattr("fastsae_kernels.proof.has_bf16", lambda: False)
    assert not bfloat16_pays(1024, 4096, 32)


@each_by
@pytest.mark.parametrize(("D", "likely"), [(256, True), (65_536, False)])
def test_where_proofs_are_likely(monkeypatch, D, likely, by):
    """The rows of wide SAEs differ too little; the fp32 GEMM is taken then."""
    monkeypatch.setattr("fastsae_kernels.proof.CPU_BF16", None)
    monkeypatch.setattr("fastsae_kernels.encode.bfloat16_pays", lambda N, F, k: True)
    x, W, b = torch.randn(40, D), torch.randn(512, D), torch.zeros(512)
    assert proofs_are_likely(x, W, b, 4, by) == likely
    assert (share_proved(x, W, b, 4, by) > 0.75) == likely
    assert equal_to_reference(x, W, b, 4, by) or likely
