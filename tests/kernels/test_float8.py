"""Rows in fp8, and encode_topk with candidates from their product (on a CPU, emulated)."""

import pytest
import torch
from torch.nn.functional import linear

from fastsae_kernels import encode_topk, float8_pays, quantize_rows, topk_indices, why_not_float8
from fastsae_kernels.encode import candidates_for, encode_topk_reference
from fastsae_kernels.float8 import (
    E4M3,
    SMALLEST_SCALE,
    Float8Rows,
    quantize_reference,
    scaled_product,
)
from fastsae_kernels.testing import assert_no_worse
from fastsae_kernels.topk import topk_reference

from .parametrize import each_by, each_dtype

D, F, K = 32, 48, 4  # sizes that a GPU takes


def integers(n: int, device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """x, W_enc, b_enc whose product fp8 gets exactly, with many ties."""
    return [torch.randint(-1, 2, size).to(device, dtype) for size in ((n, D), (F, D), (F,))]


def clear(n: int, device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """x, W_enc, b_enc with K latents of each token far above the others, a power of two apart."""
    x = torch.zeros(n, D)
    for row in x:
        row[torch.randperm(D)[:K]] = 2.0 ** torch.arange(K)
    W = torch.eye(F, D)
    return [t.to(device, dtype) for t in (x, W + 1e-3 * torch.randn(F, D), torch.zeros(F))]


@each_dtype
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (7, 33), (3, 300)], ids=str)
def test_rows_are_rounded_to_four_bits(device, shape, dtype):
    x = (torch.randn(shape) * 10 ** torch.randn(shape[0], 1)).to(device, dtype)
    rows, scale = quantize_rows(x)
    assert rows.dtype == E4M3 and scale.dtype == torch.float32
    assert torch.equal(scale.log2(), scale.log2().round()), "powers of two divide exactly"
    largest = rows.float().abs().amax(1)
    assert ((largest >= 128) & (largest <= 256)).all()
    back = rows.float() * scale[:, None]
    half = torch.maximum(2**-4 * x.float().abs(), 2**-10 * scale[:, None])
    assert ((back - x.float()).abs() <= half).all()


def test_rows_of_every_size(device):
    """Zeros stay zeros, tiny rows vanish, the largest numbers fit, NaN and Inf mark their row."""
    x = torch.tensor([0.0, 1e-40, 3e38, float("nan"), float("inf"), -float("inf")])
    x = torch.stack([x, torch.ones(6)], dim=1).to(device)
    x[:3, 1] = 0
    rows, scale = quantize_rows(x)
    back = rows.float() * scale[:, None]
    assert back[0].tolist() == back[1].tolist() == [0, 0]
    assert float(scale[0]) == SMALLEST_SCALE
    torch.testing.assert_close(back[2], x[2], rtol=2**-4, atol=0.0)
    assert scale[3:].isinf().all()


@each_dtype
@pytest.mark.parametrize("D", [1, 33, 600])
def test_rows_have_the_bits_of_the_reference(device, D, dtype):
    """Also ties between neighbors, and subnormal numbers."""
    x = torch.randn(20, D) * 10 ** torch.randn(20, D)
    x[0] = torch.linspace(-256, 256, D)
    x[1] = 256.0
    x[1, 1:] = torch.linspace(0, 2**-5, D - 1)
    x = x.to(device, dtype)
    for got, expected in zip(quantize_rows(x), quantize_reference(x), strict=True):
        assert torch.equal(got.float(), expected.float())


@pytest.mark.parametrize("at_once", [1, 3])
def test_rows_in_blocks_and_in_place(device, at_once, monkeypatch):
    """Blocks of rows change nothing, and what is there is overwritten."""
    x = torch.randn(7, 16).to(device)
    whole = quantize_rows(x)
    monkeypatch.setattr("fastsae_kernels.float8.rows_at_a_time", lambda x, D: at_once)
    out = quantize_rows(-2 * x)
    assert quantize_rows(x, out) is out
    assert torch.equal(out.rows.float(), whole.rows.float()) and torch.equal(out.scale, whole.scale)


def test_the_product_is_exact_where_fp8_is(device):
    x, W, b = integers(5, device, torch.float32)
    h = scaled_product(4 * x, quantize_rows(8 * W), b)
    assert h.dtype == torch.bfloat16
    assert torch.equal(h, linear(32 * x, W, b).bfloat16())


@each_by
@each_dtype
@pytest.mark.parametrize("n", [0, 1, 7])
def test_ties_go_to_the_lowest_latent(device, n, dtype, by):
    x, W, b = integers(n, device, dtype)
    for got, expected in zip(
        encode_topk(x, W, b, K, by, shadow=quantize_rows(W)),
        encode_topk_reference(x, W, b, K, by),
        strict=True,
    ):
        assert torch.equal(got, expected)


@each_by
def test_equal_rows_are_ranked_by_their_number(device, by):
    """More copies of each latent than there is room for among the candidates."""
    x, W = torch.randn(6, D).to(device), torch.randn(3, D).to(device).repeat(F // 3, 1)
    _, indices = encode_topk(x, W, x.new_zeros(F), K, by, shadow=quantize_rows(W))
    pre = linear(x, W[:3])
    best = (pre.abs() if by == "abs" else pre).argmax(1)
    expected = best[:, None] + 3 * torch.arange(K, device=device)
    assert torch.equal(indices, expected)


@each_by
@each_dtype
def test_where_candidates_hold_all_the_ranking_is_exact(device, dtype, by):
    """With gradients: what the shadow proposes does not enter them."""
    arguments = clear(7, device, dtype)
    assert_no_worse(
        lambda x, W, b: encode_topk(x, W, b, K, by, shadow=quantize_rows(W.detach())),
        lambda x, W, b: encode_topk_reference(x, W, b, K, by),
        *arguments,
    )


def test_ranked_before_they_are_rounded(device):
    """Pre-activations that are equal in bfloat16 are told apart by their sums in fp32."""
    W = torch.zeros(F, D).to(device, torch.bfloat16)
    W[0, 0] = W[1, 0] = 256
    W[1, 1] = 0.5
    x = torch.ones(1, D).to(W)
    values, indices = encode_topk(x, W, W.new_zeros(F), 2, shadow=quantize_rows(W))
    assert indices.tolist() == [[1, 0]] and values.tolist() == [[256, 256]]


@each_by
def test_a_wrong_shadow_only_proposes(device, by):
    x, W, b = integers(9, device, torch.float32)
    shadow = quantize_rows(integers(9, device, torch.float32)[1])
    values, indices = encode_topk(x, W, b, K, by, shadow=shadow)
    candidates = topk_indices(scaled_product(x, shadow, b), candidates_for(K, F, E4M3), by)
    pre = torch.addmm(b, x, W.t())
    proposed = torch.zeros_like(pre, dtype=torch.bool).scatter(1, candidates, True)
    pre = pre.masked_fill(~proposed, -1e9 if by == "value" else 0.0)
    expected, places = topk_reference(pre, K, by)
    assert torch.equal(values, expected)
    assert torch.equal(indices[expected != 0], places[expected != 0])


def test_compiles_in_one_graph(device):
    """opcheck, which test_library has for the other shadows, cannot compare fp8 on a CPU."""
    x, W, b = leaves = [t.requires_grad_() for t in clear(5, device, torch.float32)]
    shadow = quantize_rows(W.detach())

    def run(encode):
        values, indices = encode(x, W, b, K, shadow=shadow)
        return values, indices, *torch.autograd.grad(values.square().sum(), leaves)

    compiled = torch.compile(encode_topk, fullgraph=True, backend="aot_eager")
    for got, expected in zip(run(compiled), run(encode_topk), strict=True):
        assert torch.equal(got, expected)


def test_nan_is_never_dropped(device):
    x, W, b = integers(4, device, torch.float32)
    x[2, 5] = float("nan")
    values, _ = encode_topk(x, W, b, K, shadow=quantize_rows(W))
    assert values.isnan().any(1).tolist() == [False, False, True, False]


@pytest.mark.parametrize(
    ("k", "F", "shadow", "expected"),
    [
        (1, 100, E4M3, 9),
        (32, 4096, E4M3, 64),
        (32, 4096, torch.int8, 48),
        (32, 99, torch.bfloat16, 48),
        (5, 7, E4M3, 7),
    ],
)
def test_candidates(k, F, shadow, expected):
    assert candidates_for(k, F, shadow) == expected


def test_a_wrong_shadow_is_refused():
    x, W, b = torch.ones(3, 4), torch.ones(5, 4), torch.ones(5)
    rows, scale = quantize_rows(W)
    with pytest.raises(ValueError, match=r"scale must have shape \[5\], got \[4\]"):
        encode_topk(x, W, b, 2, shadow=Float8Rows(rows, scale[:4]))
    with pytest.raises(ValueError, match="shadow must have the shape of W_enc"):
        encode_topk(x, W, b, 2, shadow=Float8Rows(rows[:4], scale))


@pytest.mark.parametrize(
    ("capability", "F", "D", "reason"),
    [
        ((9, 0), 4096, 384, None),
        ((8, 9), 4096, 384, None),
        ((10, 0), 4096, 384, None),
        ((8, 6), 4096, 384, "capability 8.9 or above, this one has 8.6"),
        ((9, 0), 4096, 100, "multiples of 16, got 100 and 4096"),
        ((9, 0), 4097, 384, "multiples of 16, got 384 and 4097"),
    ],
)
def test_which_gpus_have_it(capability, F, D, reason, monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    found = why_not_float8(F, D, "cuda")
    assert found is None if reason is None else reason in (found or "")


def test_a_cpu_has_it_not():
    assert why_not_float8(4096, 384, "cpu") == "fp8 needs a GPU"


def test_when_it_pays():
    assert float8_pays(131_072, 64) and float8_pays(1 << 20, 128)
    assert not float8_pays(32_768, 32) and not float8_pays(24_576, 32)
    assert float8_pays(1 << 20, 512) and not float8_pays(1 << 20, 513)
