"""Rows in int8, and encode_topk with candidates from their product on a CPU."""

import pytest
import torch
from torch.nn.functional import linear

from fastsae_kernels import balance, encode_topk, int8, quantize_int8, why_not_int8
from fastsae_kernels.adam import Rows
from fastsae_kernels.encode import candidates_for, encode_topk_reference
from fastsae_kernels.int8 import (
    LARGEST,
    SMALLEST_SCALE,
    Int8Rows,
    int8_product,
    int8_product_reference,
    quantize_int8_reference,
)
from fastsae_kernels.testing import assert_no_worse
from fastsae_kernels.topk import largest_in_columns, topk_reference

from .parametrize import each_by, each_dtype

K = 4


@pytest.fixture(params=["emulated", "oneDNN"])
def gemm(request, monkeypatch):
    """Both int8 GEMMs, where the processor supports oneDNN's."""
    if request.param == "emulated":
        monkeypatch.setattr(int8, "why_not_int8", lambda device: "a test")
    elif reason := why_not_int8("cpu"):
        pytest.skip(reason)


def problem(N: int, D: int, F: int, dtype=torch.float32) -> list[torch.Tensor]:
    return [torch.randn(size).to(dtype) for size in ((N, D), (F, D), (F,))]


@each_dtype
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (7, 33), (3, 300)], ids=str)
def test_rows_are_rounded_to_the_nearest_level(shape, dtype):
    x = (torch.randn(shape) * 10 ** torch.randn(shape[0], 1)).to(dtype)
    rows, scale, columns = quantize_int8(x)
    assert rows.dtype == torch.int8 and scale.dtype == torch.float32
    assert torch.equal(scale, scale.bfloat16().float())
    assert ((rows.abs().amax(1) >= LARGEST - 1) & (rows > -128).all(1)).all()
    half = scale[:, None] / 2 * (1 + 1e-5)
    assert ((rows.float() * scale[:, None] - x.float()).abs() <= half).all()
    assert columns.tolist() == [1] * shape[1]
    for got, expected in zip((rows, scale), quantize_int8_reference(x), strict=True):
        assert torch.equal(got, expected)


def test_rows_of_every_size():
    """Zeros stay zeros, the largest numbers fit, NaN and Inf mark their row."""
    x = torch.tensor([[0.0, 0.0], [1e-40, 0], [3e38, -1e38], [float("nan"), 1], [float("inf"), 1]])
    rows, scale, _ = quantize_int8(x)
    assert rows[:2].tolist() == [[0, 0], [0, 0]]
    assert float(scale[0]) == pytest.approx(SMALLEST_SCALE)
    assert rows[2].tolist() == [127, -42]
    assert scale[3].isnan() and scale[4].isinf()


@pytest.mark.parametrize("shape", [(0, 3, 5), (1, 1, 1), (7, 33, 20), (65, 768, 100)], ids=str)
def test_the_product_is_rounded_to_bfloat16_twice(gemm, shape):
    """Sums of int8 are exact. The sum is rounded after the tokens' scale, and again at the end. In
    fp32, the products with both scales and the last sum round as well.
    """
    x, W, b = problem(*shape)
    quantized = quantize_int8(W, 2.0 ** torch.randint(-3, 4, (shape[1],)))
    h = int8_product(x, quantized, b)
    assert h.dtype == torch.bfloat16 and h.shape == (len(W), len(x))
    exact = int8_product_reference(x, quantized, b.double())
    terms = (exact - b[:, None]).abs() + b.abs()[:, None]
    low, high = (torch.finfo(dtype).eps / 2 for dtype in (torch.bfloat16, torch.float32))
    allowed = (1 + low) ** 2 * (1 + high) ** 3 - 1
    assert ((h.double() - exact).abs() <= allowed * terms).all()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("F", "k"), [(1, 1), (9, 3), (1000, 20), (1000, 3), (1003, 5), (40, 40)])
def test_largest_in_columns(F, k, dtype, sign):
    """Positive, mixed and negative."""
    pre = torch.stack([(torch.randperm(F) - n).div(100) for n in (0, F // 3, F)], 1)
    pre = (sign * pre).to(dtype)
    found = pre.t().gather(1, largest_in_columns(pre, k))
    assert torch.equal(found.sort(1, descending=True).values, pre.t().topk(k).values)


@pytest.mark.parametrize("negative", [0, 1, 5, 8])
def test_columns_of_negative_numbers(negative):
    """Few are searched again alone, most together with the others."""
    pre = torch.stack([(torch.randperm(500) + 1).bfloat16() for _ in range(8)], 1)
    pre[:, :negative] *= -1
    found = pre.t().gather(1, largest_in_columns(pre, 3))
    assert torch.equal(found.sort(1, descending=True).values, pre.t().topk(3).values)


@each_by
@each_dtype
def test_where_candidates_hold_all_the_ranking_is_exact(gemm, dtype, by):
    """With gradients: what the shadow proposes does not enter them."""
    F = candidates_for(K, 100, torch.int8)  # so few that all are candidates
    arguments = [t.to(dtype) for t in problem(7, 32, F)]
    assert_no_worse(
        lambda x, W, b: encode_topk(x, W, b, K, by, shadow=quantize_int8(W.detach())),
        lambda x, W, b: encode_topk_reference(x, W, b, K, by),
        *arguments,
    )


@each_by
def test_true_members_are_among_the_candidates(gemm, by):
    """Also with outlier dimensions and tokens, and however the rows of W are scaled."""
    x, W, b = problem(300, 64, 2048)
    x[:, :2] *= 100
    x[5] *= 1000
    W *= 10 ** torch.rand(2048, 1)
    _, indices = encode_topk(x, W, b, 16, by, shadow=quantize_int8(W, balance(x)))
    _, expected = topk_reference(linear(x.double(), W.double(), b.double()), 16, by)
    kept = (indices[:, None] == expected[:, :, None]).any(2)
    assert kept.all()


@each_by
def test_a_wrong_shadow_only_proposes(gemm, by):
    x, W, b = (torch.randint(-3, 4, t.shape).float() for t in problem(9, 32, 200))
    shadow = quantize_int8(torch.randn(200, 32))
    values, indices = encode_topk(x, W, b, K, by, shadow=shadow)
    spare = candidates_for(K, 200, torch.int8)
    pre, low = linear(x, W, b), int8_product(x, shadow, b)
    proposed = torch.zeros_like(pre, dtype=torch.bool)
    proposed.scatter_(1, largest_in_columns(low.abs() if by == "abs" else low, spare), True)
    pre = pre.masked_fill(~proposed, -1e9 if by == "value" else 0.0)
    expected, places = topk_reference(pre, K, by)
    assert torch.equal(values, expected)
    assert torch.equal(indices[expected != 0], places[expected != 0])


def test_nan_is_never_dropped(gemm):
    x, W, b = problem(4, 32, 200)
    x[2, 5] = float("nan")
    values, _ = encode_topk(x, W, b, K, shadow=quantize_int8(W))
    assert values.isnan().any(1).tolist() == [False, False, True, False]


def test_columns_are_evened_out():
    """Large and small dimensions, and one that is always 0; a few huge tokens do not count."""
    x = torch.randn(5000, 6) * torch.tensor([1, 1, 16, 16, 256, 0])
    columns = balance(x)
    assert torch.equal(columns.log2(), columns.log2().round())
    assert 0 < columns[5] < columns[0] < columns[2] < columns[4] <= 1
    assert columns[4] >= 8 * columns[0]
    x[7] *= 1e6
    x[8, 2], x[9, 0] = float("nan"), float("inf")
    assert torch.equal(balance(x), columns)
    assert balance(x[8:10]).tolist() == [1] * 6


@pytest.mark.parametrize("rows", [slice(2, 5), torch.tensor([0, 6])], ids=str)
def test_a_copy_is_brought_up_to_date_by_rows(rows):
    W = torch.randn(7, 5)
    moments = torch.zeros(2, 7, 5)
    state = Rows(W, moments[0], moments[1], None, quantize_int8(W, 2.0 ** torch.arange(5)))
    W[rows] *= -3
    state.refresh(rows, W[rows])
    assert state.quantized is not None
    again = quantize_int8(W, 2.0 ** torch.arange(5))
    for got, expected in zip(state.quantized, again, strict=True):
        assert torch.equal(got, expected)


def test_a_wrong_shadow_is_refused():
    x, W, b = torch.ones(3, 4), torch.ones(5, 4), torch.ones(5)
    rows, scale, columns = quantize_int8(W)
    with pytest.raises(ValueError, match=r"scale must have shape \[5\], got \[4\]"):
        encode_topk(x, W, b, 2, shadow=Int8Rows(rows, scale[:4], columns))
    with pytest.raises(ValueError, match="shadow must be torch.bfloat16, got torch.float32"):
        encode_topk(x, W, b, 2, shadow=W)
    with pytest.raises(ValueError, match=r"columns must have shape \[4\], got \[3\]"):
        encode_topk(x, W, b, 2, shadow=Int8Rows(rows, scale, columns[:3]))


@pytest.mark.parametrize(
    ("device", "instructions", "reason"),
    [
        ("cuda", {"avx512_vnni"}, "int8 is for CPUs"),
        ("cpu", {"avx512_f"}, "int8 needs a processor with VNNI instructions"),
        ("cpu", {"avx_vnni"}, None),
    ],
)
def test_which_machines_have_it(device, instructions, reason, monkeypatch):
    monkeypatch.setattr(int8, "instructions", lambda: instructions)
    assert why_not_int8(device) == reason
