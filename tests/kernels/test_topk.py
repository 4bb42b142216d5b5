import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from fastsae_kernels import topk
from fastsae_kernels._launch import use_triton
from fastsae_kernels.testing import assert_no_worse
from fastsae_kernels.topk import By, topk_indices, topk_reference, write_topk

from .parametrize import each_by

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [  # N, F, k
    (1, 1, 1),
    (5, 37, 3),
    (3, 37, 37),
    (2, 1000, 1),
    (3, 2049, 40),
    (2, 6000, 60),  # more than one entry of a group per pass of the kernel
    (0, 16, 2),
]
INF, NAN = float("inf"), float("nan")


def rows(kind: str, N: int, F: int) -> torch.Tensor:
    if kind == "integers":
        return torch.randint(-3, 4, (N, F)).float()
    if kind == "negative":
        return -torch.rand(N, F) - 0.1
    if kind == "constant":
        return torch.tensor([1.5, -1.5, 0.0, INF, -INF, NAN])[torch.arange(N) % 6, None].repeat(
            1, F
        )
    if kind == "zeros":
        return torch.tensor([0.0, -0.0])[torch.randint(2, (N, F))]
    if kind == "block":  # the large entries are neighbors
        return torch.randn(N, F) + 10 * (torch.arange(F) < F // 4)
    return torch.randn(N, F)


def assert_as_reference(pre: torch.Tensor, k: int, by: By = "value") -> None:
    values, indices = topk(pre, k, by)
    expected, places = topk_reference(pre, k, by)
    assert torch.equal(indices, places)
    torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)


@each_by
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "N{}-F{}-k{}".format(*s))
def test_values_indices_and_gradient(device, shape, dtype, by):
    N, F, k = shape
    pre = torch.randn(N, F).to(device, dtype)
    assert_no_worse(lambda pre: topk(pre, k, by), lambda pre: topk_reference(pre, k, by), pre)


@each_by
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("F", "k"), [(37, 3), (1003, 5), (4096, 40), (40, 40)])
def test_ties_to_any(F, k, dtype, by):
    """Rows with many, exactly k, k - 1 and no positive entries."""
    positive = torch.tensor([F // 2, k, k - 1, 0])[:, None]
    pre = torch.stack([torch.randperm(F) for _ in range(4)]).where(torch.arange(F) < positive, 0)
    pre = (pre + 1).where(torch.arange(F) < positive, -1 - torch.rand(4, F)).to(dtype)
    pre = pre[:, torch.randperm(F)]
    rank = pre.abs() if by == "abs" else pre
    found = rank.gather(1, topk_indices(pre, k, by, ties="any"))
    assert torch.equal(found.sort(1, descending=True).values, rank.topk(k).values)


@each_by
@pytest.mark.parametrize("kind", ["integers", "negative", "constant", "zeros", "block"])
@pytest.mark.parametrize("F, k", [(33, 33), (3000, 20)])
def test_ties_go_to_the_lowest_index(device, kind, F, k, by):
    assert_as_reference(rows(kind, 6, F).to(device), k, by)
    assert_as_reference(rows(kind, 6, F).to(device, torch.bfloat16), k, by)


@each_by
def test_duplicates_across_the_last_place(device, by):
    pre = torch.randn(2, 500)
    pre[:, ::7] = pre.sort(descending=True).values[:, 9:10]  # the tenth, 72 times over
    for k in (9, 10, 11, 40):
        assert_as_reference(pre.to(device), k, by)


@pytest.mark.parametrize("large", [64, 128, 256])
def test_more_candidates_than_room(device, large):
    """No ties, but large neighbors share a few groups: the kernel has to look at every entry."""
    pre = torch.rand(2, 1 << 13)
    pre[:, :large] += 10
    assert_as_reference(pre.to(device), 64)


@pytest.mark.parametrize("step", [1024, 2048])
def test_a_group_with_several_of_the_largest(device, step):
    """The kernel reads one piece of a group again, or all if another has a candidate: here 4 do."""
    pre = torch.randn(2, 4 * step)
    pre[:, 7::step] += 10
    pre[:, 20] = pre[:, 20 + step] = 9.0
    assert_as_reference(pre.to(device), 12)
    assert_as_reference(pre.to(device, torch.bfloat16), 12)


@each_by
@pytest.mark.parametrize("k", [20, 1100])
def test_into_slices_from_rows_apart(device, by, k):
    pre = torch.randn(3, 1210).to(device)[:, 3:1203]
    values = torch.full((5, k), 7.0, device=device)
    indices = torch.full((5, k), -1, device=device)
    write_topk(pre, k, by, values[1:4], indices[1:4])
    expected, places = topk_reference(pre, k, by)
    assert torch.equal(indices[1:4], places)
    assert torch.equal(values[1:4], expected)
    assert indices[[0, 4]].eq(-1).all() and values[[0, 4]].eq(7).all()


def test_the_kernel_writes_int32_as_well(device):
    pre = torch.randn(3, 300).to(device)
    if not use_triton(pre):
        pytest.skip("the torch path gathers by int64")
    indices = torch.empty(3, 5, dtype=torch.int32, device=device)
    write_topk(pre, 5, "value", None, indices)
    assert torch.equal(indices.long(), topk_reference(pre, 5)[1])


@each_by
def test_nan_is_kept_and_ranks_first(device, by):
    pre = torch.randn(5, 300)
    pre[0, 7] = pre[1, [3, 250]] = pre[2, ::2] = pre[3] = NAN
    pre[1, 4] = INF
    pre[4, 5] = -NAN
    assert_as_reference(pre.to(device), 20, by)
    nans = topk(pre.to(device), 20, by)[0].isnan().sum(1)
    assert nans.tolist() == [1, 2, 20, 20, 1]


@pytest.mark.parametrize("k", [300, 1024])
def test_many_kept(device, k):
    """Beyond 256 the kernel sorts instead of counting ranks."""
    if device == "cpu" and k == 1024:
        k = 257
    assert_as_reference(torch.randint(-99, 99, (1, 1500)).to(device, torch.float32), k)


def test_more_kept_than_the_kernel_takes(device):
    assert_as_reference(torch.randint(-99, 99, (3, 3000)).to(device, torch.float32), 2999)


@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data(), F=st.integers(1, 400), by=st.sampled_from(["value", "abs"]))
def test_any_row(device, data, F, by):
    k = data.draw(st.integers(1, min(F, 128)))
    kind = data.draw(st.sampled_from(["normal", "integers", "zeros", "block"]))
    dtype = data.draw(st.sampled_from(DTYPES))
    assert_as_reference(rows(kind, 2, F).to(device, dtype), k, by)


def test_any_strides(device):
    pre = torch.randn(60, 4).to(device)
    assert_as_reference(pre.t(), 7)


def test_float64(device):
    assert_as_reference(torch.randn(3, 200, dtype=torch.float64).to(device), 9)


def test_same_bits_twice(device):
    pre = torch.randint(-9, 9, (4, 1000)).to(device, torch.float32)
    assert torch.equal(topk_indices(pre, 30), topk_indices(pre, 30))


@each_by
def test_gradient(device, by):
    pre = torch.randn(3, 8, dtype=torch.float64).to(device).requires_grad_()
    assert gradcheck(lambda pre: topk(pre, 3, by)[0], pre)


@each_by
def test_inactive_entries_get_no_gradient(device, by):
    pre = torch.tensor([[0.0, 2.0, -0.0, -1.0]]).to(device).requires_grad_()
    values, indices = topk(pre, 4, by)
    values.sum().backward()
    assert pre.grad is not None
    assert pre.grad.tolist() == [[0, 1, 0, 0 if by == "value" else 1]]


@pytest.mark.parametrize(
    ("pre", "k", "by", "message"),
    [
        (torch.ones(3), 1, "value", r"pre must be floating point of shape \[any, any\]"),
        (torch.ones(3, 4, dtype=torch.int64), 1, "value", "pre must be floating point"),
        (torch.ones(3, 4), 0, "value", "k must be between 1 and d_sae = 4, got 0"),
        (torch.ones(3, 4), 5, "value", "k must be between 1 and d_sae = 4, got 5"),
        (torch.ones(0, 4), 2, "size", 'by must be "value" or "abs", got \'size\''),
    ],
)
def test_wrong_arguments_are_named(pre, k, by, message):
    with pytest.raises(ValueError, match=message):
        topk(pre, k, by)
