"""What exceeds a threshold, listed from bfloat16 candidates on a CPU."""

import pytest
import torch

from fastsae_kernels import encode_above, encode_topk_batch, gather_dot
from fastsae_kernels.encode_above import encode_above_reference
from fastsae_kernels.listing import Listing, list_above, rounded_up
from fastsae_kernels.product import product
from fastsae_kernels.testing import assert_no_worse
from fastsae_kernels.topk_batch import encode_topk_batch_reference

from .parametrize import each_by
from .test_encode_above import integers, separated
from .test_proof import OPERANDS


@pytest.fixture(autouse=True)
def on_any_cpu(monkeypatch):
    monkeypatch.setattr("fastsae_kernels.proof.CPU_BF16", "1")
    monkeypatch.setattr("fastsae_kernels.listing.SPARSE", 0)


@pytest.fixture
def products(monkeypatch):
    """The dtypes of all GEMMs."""
    dtypes = []

    def recorded(x, *rest):
        dtypes.append(x.dtype)
        return product(x, *rest)

    monkeypatch.setattr("fastsae_kernels.listing.product", recorded)
    return dtypes


def in_lists(x, W, b, threshold, by):
    """All entries above a threshold per latent, and their positions."""
    values, positions = [], []
    for at, list_chunk in Listing(x, W, b, by).chunks():
        more, places = list_chunk(threshold)
        values.append(more)
        positions.append(places + at.start)
    return torch.cat(values), torch.cat(positions)


@each_by
@pytest.mark.parametrize("kind", [kind for kind in OPERANDS if kind != "large"])  # no finite norms
@pytest.mark.parametrize("D", [1, 33, 5000])
def test_nothing_above_the_threshold_is_missed(kind, D, by, products):
    """With thresholds that an entry of each latent equals or exceeds by the least amount."""
    F = 200
    x, W, b = OPERANDS[kind](64, D, F)
    h = gather_dot(x, torch.arange(F).expand(64, -1), W) + b
    rank = h.abs() if by == "abs" else h
    equal = rank[torch.randint(64, (F,)), torch.arange(F)]
    thresholds = [equal, equal.nextafter(torch.tensor(-torch.inf))]
    if by == "abs":  # with one threshold for all, bfloat16 leaves out most of what is below
        thresholds += [t.quantile(0.9).expand(F) for t in (rank, equal)]
    for threshold in thresholds:
        got = in_lists(x, W, b, threshold, by)
        for one, two in zip(got, list_above(h, threshold, by), strict=True):
            assert torch.equal(one, two)
    assert set(products) == {torch.bfloat16}


@each_by
@pytest.mark.parametrize("shape", [(7, 33, 20), (6, 64, 70)])
def test_entries_and_gradients(shape, by):
    """With thresholds that differ."""
    x, W, b, threshold = separated(shape, "cpu", torch.float32, by)
    assert len(threshold.unique()) > 1
    assert_no_worse(
        lambda x, W, b: encode_above(x, W, b, threshold, by),
        lambda x, W, b: encode_above_reference(x, W, b, threshold, by),
        x, W, b,
    )  # fmt: skip


@each_by
@pytest.mark.parametrize("k_total", [0, 1, 30, 300, 9 * 70])
def test_the_largest_of_a_batch(k_total, by, monkeypatch, products):
    """With ties, in chunks of three tokens."""
    x, W, b = integers((9, 5, 70), "cpu")
    expected = encode_topk_batch_reference(x, W, b, k_total, by)
    monkeypatch.setattr("fastsae_kernels._launch.buffer_bytes", lambda device: 3 * 70 * 4)
    for hint in (0.0, 1.0, 100.0):
        got = encode_topk_batch(x, W, b, k_total, by, hint)
        for one, two in zip(got, expected, strict=True):
            assert torch.equal(one, two)
    assert set(products) == ({torch.bfloat16} if k_total else set())


@each_by
@pytest.mark.parametrize("shape", [(0, 8, 20), (3, 8, 0)])
def test_nothing_to_list(shape, by):
    x, W, b = integers(shape, "cpu")
    expected = encode_above_reference(x, W, b, 0.5, by) if shape[2] else 3 * [torch.zeros(3, 1)]
    for got in (encode_above(x, W, b, 0.5, by), encode_topk_batch(x, W, b, 0, by)):
        for one, two in zip(got[:2], expected[:2], strict=True):
            assert one.shape == two.shape and not one.any()


def test_rounding_up_to_bfloat16():
    numbers = torch.tensor([1.0, 1.001, -1.001, 0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38])
    expected = [1, 1.0078125, -1, 0, 0, 2**-133, 0, torch.inf, torch.finfo(torch.bfloat16).min]
    assert rounded_up(numbers).tolist() == expected


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf"), 3e38])
def test_numbers_without_a_bound_are_left_to_fp32(broken, products):
    """In tokens, weights, biases and thresholds."""
    for which in range(4):
        x, W, b = integers((8, 6, 40), "cpu")
        threshold = torch.full((40,), 0.5)
        (x, W, b, threshold)[which].view(-1)[3] = broken
        expected = encode_above_reference(x, W, b, threshold)
        for one, two in zip(encode_above(x, W, b, threshold), expected, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=0)
        if broken != 3e38 or which < 2:
            assert products.pop() == torch.float32


def test_after_a_chunk_with_too_many_entries_bfloat16_is_not_tried(monkeypatch, products):
    monkeypatch.setattr("fastsae_kernels.listing.SPARSE", 4)
    monkeypatch.setattr("fastsae_kernels._launch.buffer_bytes", lambda device: 10 * 40 * 4)
    x, W, b = torch.ones(40, 2), torch.ones(40, 2), torch.zeros(40)
    x[:10], W[20:] = -1, torch.tensor([-1.0, 0.5])
    W[20:28] = -1
    x[10:20, 1] = -1
    for one, two in zip(
        encode_above(x, W, b, 0.9), encode_above_reference(x, W, b, 0.9), strict=True
    ):
        assert torch.equal(one, two)
    assert products == [torch.bfloat16, torch.bfloat16, torch.bfloat16, *[torch.float32] * 2]


@pytest.mark.parametrize(("hint", "dtypes"), [(1e-9, "lhlll"), (0.75, "llll")])
def test_the_largest_of_a_batch_after_a_hint_that_is_too_low(hint, dtypes, monkeypatch, products):
    """Its first chunk has too many entries; the others have a threshold that this chunk raised."""
    monkeypatch.setattr("fastsae_kernels.listing.SPARSE", 4)
    monkeypatch.setattr("fastsae_kernels._launch.buffer_bytes", lambda device: 50 * 40 * 4)
    x, W, b = torch.rand(200, 40), torch.eye(40), torch.full((40,), -0.1)
    got = encode_topk_batch(x, W, b, 600, "value", hint)
    for one, two in zip(got, encode_topk_batch_reference(x, W, b, 600), strict=True):
        assert torch.equal(one, two)
    names = {"l": torch.bfloat16, "h": torch.float32}
    assert products == [names[name] for name in dtypes]
