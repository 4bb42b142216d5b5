import pytest
import torch

from fastsae_kernels.rescore import rescore, rescore_reference
from fastsae_kernels.testing import assert_no_worse

from .parametrize import each_by

SHAPES = [  # N, D, F, C, k: one; odd; more candidates than a tile; all kept; no tokens
    (1, 1, 1, 1, 1),
    (7, 33, 40, 9, 3),
    (5, 20, 300, 150, 70),
    (3, 1030, 30, 12, 12),
    (0, 8, 20, 6, 4),
]
each_shape = pytest.mark.parametrize(
    "shape", SHAPES, ids=lambda s: "N{}-D{}-F{}-C{}-k{}".format(*s)
)


def make(
    shape, device, draw, dtype=torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, W, b and candidates in any order"""
    N, D, F, C, _ = shape
    candidates = torch.rand(N, F).topk(C).indices.to(device)
    x, W, b = (draw(size).to(device, dtype) for size in ((N, D), (F, D), (F,)))
    return x, W, b, candidates


def integers(size) -> torch.Tensor:
    """With sums that every order of summation gets exactly, and many ties."""
    return torch.randint(-1, 2, size).float()


@each_by
@each_shape
def test_values_and_latents(device, shape, by):
    k = shape[-1]
    with torch.no_grad():  # it has no gradient
        assert_no_worse(
            lambda x, W, b, candidates: rescore(x, W, b, candidates, k, by),
            lambda x, W, b, candidates: rescore_reference(x, W, b, candidates, k, by),
            *make(shape, device, torch.randn),
        )


@each_by
@each_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_ties_go_to_the_lowest_latent(device, shape, dtype, by):
    arguments = (*make(shape, device, integers, dtype), shape[-1], by)
    got, expected = rescore(*arguments), rescore_reference(*arguments)
    for one, two in zip(got, expected, strict=True):
        assert one.dtype == two.dtype and torch.equal(one, two)


def test_nan_comes_first(device):
    x, W, b, candidates = make((4, 9, 30, 12, 5), device, torch.randn)
    x[2, 3] = float("nan")
    W[candidates[0, 7]] = float("nan")
    values, indices = rescore(x, W, b, candidates, 5)
    assert values[2].isnan().all() and values[0, 0].isnan()
    assert torch.equal(indices[2], candidates[2].sort().values[:5])
    assert indices[0, 0] == candidates[0, 7]


def test_ranked_before_they_are_rounded(device):
    """Values that are equal in bfloat16 are told apart by their sums in fp32."""
    W = torch.tensor([[256, 0], [256, 0.5], [256, 0.25]]).to(device, torch.bfloat16)
    x, b = W.new_ones(1, 2), W.new_zeros(3)
    candidates = torch.arange(3, device=device)[None]
    values, indices = rescore(x, W, b, candidates, 3)
    assert indices.tolist() == [[1, 2, 0]] and values.tolist() == [[256, 256, 256]]


def test_same_bits_twice(device):
    arguments = make((6, 40, 50, 20, 8), device, torch.randn)
    for one, two in zip(rescore(*arguments, 8), rescore(*arguments, 8), strict=True):
        assert torch.equal(one, two)
