"""bfloat16 candidates on a CPU: the bound on their rounding errors, and what it proves."""

import pytest
import torch

from fastsae_kernels import encode_topk
from fastsae_kernels.encode import encode_topk_reference
from fastsae_kernels.product import product
from fastsae_kernels.proof import (
    bfloat16_pays,
    bias_error,
    prepare,
    rounding_bound,
    select_proved,
    sums_error,
)
from fastsae_kernels.rescore import ranked
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
    low = prepare(x, W, b, k, by)
    assert low is not None
    return 1 - len(select_proved(x, W, b, low, k, by)[2]) / len(x)


OPERANDS = {
    "normal": lambda N, D, F: (torch.randn(N, D), torch.randn(F, D), torch.randn(F)),
    "halfway": lambda N, D, F: (halfway(N, D), halfway(F, D), halfway(F)),
    "one sign": lambda N, D, F: (halfway(N, D).abs(), halfway(F, D).abs(), -halfway(F).abs()),
    "outliers": lambda N, D, F: (
        torch.randn(N, D) * torch.randn(D).exp() ** 3, torch.randn(F, D), torch.zeros(F)
    ),
    "large": lambda N, D, F: (torch.randn(N, D) * 1e30, torch.randn(F, D), torch.randn(F)),
}  # fmt: skip
# Squares are subnormal, then the numbers themselves.
for scale in (1e-20, 1e-24, 1e-38):
    OPERANDS[f"x * {scale}"] = lambda N, D, F, scale=scale: (
        torch.randn(N, D) * scale, torch.randn(F, D), torch.zeros(F)
    )  # fmt: skip
OPERANDS["W * 1e-24"] = lambda N, D, F: (
    torch.randn(N, D), torch.randn(F, D) * 1e-24, torch.zeros(F)
)  # fmt: skip


@pytest.mark.parametrize("kind", OPERANDS)
@pytest.mark.parametrize("D", [1, 33, 5000])
def test_no_rounding_error_exceeds_the_bound(kind, D):
    """Of the product in bfloat16 and of rescoring together."""
    x, W, b = OPERANDS[kind](64, D, 200)
    low = prepare(x, W, b, 1, "value")
    assert low is not None
    assert torch.equal(low.rows, W.bfloat16())
    proposed = product(x.bfloat16(), low.rows, b.bfloat16()).float()
    every = torch.arange(200).expand(64, -1)
    h, latents = ranked(x, W, b, every, 200, "value")
    rescored = torch.empty_like(h).scatter_(1, latents, h)
    bias = bias_error(b) + sums_error(D) * b.abs().amax()
    for one, two in zip(proposed.unbind(1), rescored.unbind(1), strict=True):
        bound = rounding_bound(x, x.bfloat16(), low, bias, one)
        assert ((one.double() - two.double()).abs() <= bound).all()


@pytest.mark.parametrize("scale", [1, 2.0**-40, 2.0**-80])
def test_no_false_proof_however_small_the_numbers(scale):
    """The largest latent is proposed last."""
    e = 2.0**-8
    x, W = scale * torch.tensor([[1 + 0.99 * e, 1 + 1.01 * e]]), torch.zeros(400, 2)
    W[:, 0], W[0], W[399] = 1, torch.tensor([0, 1 + 0.5 * e]), torch.tensor([1 + 0.99 * e, 0])
    assert encode_topk(x, W, torch.zeros(400), 1)[1].tolist() == [[399]]
    assert encode_topk(x / scale, W * scale, torch.zeros(400), 1)[1].tolist() == [[399]]


def equal_to_reference(x, W, b, k, by):
    got = encode_topk(x, W, b, k, by)
    expected = encode_topk_reference(x, W, b, k, by)
    return all(torch.equal(*each) for each in zip(got, expected, strict=True))


@each_by
def test_most_tokens_are_proved(by):
    """With gradients."""
    x, W, _ = separated((200, 256, 2048, 16), "cpu", torch.float32, by)
    W, b = W / W.norm(dim=1, keepdim=True), torch.zeros(len(W))
    assert share_proved(x, W, b, 16, by) > 0.95
    _, best = encode_topk_reference(x.double(), W.double(), b.double(), 16, by)
    assert torch.equal(encode_topk(x, W, b, 16, by)[1], best)
    assert_no_worse(
        lambda x, W, b: encode_topk(x, W, b, 16, by),
        lambda x, W, b: encode_topk_reference(x, W, b, 16, by),
        x, W, b,
    )  # fmt: skip


@each_by
def test_latents_that_bfloat16_does_not_tell_apart(by):
    """More of them than candidates."""
    W, x, b = torch.ones(400, 8) + 1e-4 * torch.rand(400, 1), torch.zeros(3, 8), torch.zeros(400)
    x[:, 3] = 1  # so that sums are the same in any order
    assert share_proved(x, W, b, 4, by) == 0
    assert equal_to_reference(x, W, b, 4, by)


@each_by
def test_tokens_with_few_positive_pre_activations(by):
    """Fewer than candidates, and for some tokens than k."""
    generator = torch.Generator().manual_seed(0)
    x, W = (torch.randint(-3, 4, (n, 32), generator=generator).float() for n in (64, 512))
    b = torch.full((512,), -52.0)
    positive = (x @ W.T + b > 0).sum(1)
    assert positive.min() < 4 < positive.max()
    assert equal_to_reference(x, W, b, 4, by)


@each_by
def test_more_candidates_are_tried_before_fp32(by, monkeypatch):
    """In chunks of eight tokens, of which half need one or two more tries."""
    monkeypatch.setattr("fastsae_kernels._launch.buffer_bytes", lambda device: 8 * 300 * 2)
    x, W, b = torch.zeros(40, 3), torch.zeros(300, 3), torch.full((300,), 0.25)
    x[0::4, 0], W[:100, 0] = 1, 1  # a hundred equal latents
    x[1::4, 1], W[:20, 1] = 1, 1  # twenty
    x[2::4, 2], x[3::4, 2], W[:, 2] = 1, -1, torch.arange(300) / 300
    shares = []
    for rounds in ((2,), (2, 8), (2, 8, 60)):
        monkeypatch.setattr("fastsae_kernels.proof.ROUNDS", rounds)
        shares.append(share_proved(x, W, b, 4, by))
        assert equal_to_reference(x, W, b, 4, by)
    assert 0 < shares[0] < shares[1] < shares[2] == 1


@pytest.mark.parametrize(("hopeless", "tried"), [(slice(0, 1000), 1), (slice(300, 1000), 6)])
def test_without_proofs_for_most_tokens_no_others_are_tried(monkeypatch, hopeless, tried):
    chunks = []

    def counted(low, *rest):
        chunks.append(low)
        return product(low, *rest)

    monkeypatch.setattr("fastsae_kernels._launch.buffer_bytes", lambda device: 100 * 400 * 2)
    monkeypatch.setattr("fastsae_kernels.proof.product", counted)
    x, W, b = torch.zeros(1000, 2), torch.zeros(400, 2), torch.zeros(400)
    x[:, 0], W[:, 0] = 1, torch.arange(400) / 400
    x[hopeless] = torch.tensor([0.0, 1.0])  # all latents are equal
    assert equal_to_reference(x, W, b, 4, "value")
    assert len(chunks) == tried + 1 if hopeless.start else tried


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
    """The rows of wide SAEs differ too little."""
    x, W, b = torch.randn(40, D), torch.randn(512, D), torch.zeros(512)
    assert (share_proved(x, W, b, 4, by) > 0.75) == likely
    monkeypatch.setattr("fastsae_kernels.proof.CPU_BF16", None)
    assert (prepare(x, W, b, 4, by) is not None) == likely
    b[7] = -1e4  # its rounding error is a part of every bound
    assert prepare(x, W, b, 4, by) is None
