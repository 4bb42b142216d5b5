"""The k best latents among several processes, against one process that sees all of them."""

import pytest
import torch
from torch import Tensor

from fastsae.codes import Codes
from fastsae.distributed import Mesh
from fastsae_kernels import By, topk, topk_batch

CASES = 60


def hard_case(number: int, F: int) -> tuple[Tensor, int, By]:
    """Pre-activations with many ties, few values, infinities, or all winners in one share; k that
    can exceed a share; and what they are ranked by."""
    generator = torch.Generator().manual_seed(number)
    N, k = int(torch.randint(1, 14, (), generator=generator)), number % (F // 2) + 1
    pre = torch.randint(-3, 4, (N, F), generator=generator).float()
    if number % 5 == 1:
        pre = torch.randn(N, F, generator=generator)
    if number % 5 == 2:
        pre[:, : F // 4] += 10
    if number % 5 == 3:
        pre[torch.rand(N, F, generator=generator) < 0.4] = -torch.inf
    if number % 5 == 4:
        pre[0] = 1.0
    by: By = "abs" if number % 2 and number % 5 != 3 else "value"
    return pre, k, by


def missed_by_token(mesh: Mesh, F: int) -> list[int]:
    missed = []
    for number in range(CASES):
        pre, k, by = hard_case(number, F)
        own = pre[:, mesh.rows(F)]
        values, indices = topk(own, min(k, own.shape[1]), by)
        kept = mesh.keep_best(Codes(values, indices, own.shape[1]), k, by)
        found = mesh.gather_latents(kept.to_dense().T.contiguous()).T
        if not torch.equal(found, Codes(*topk(pre, k, by), F).to_dense()):
            missed.append(number)
    return missed


def missed_by_batch(mesh: Mesh, F: int) -> list[int]:
    missed = []
    for number in range(CASES):
        pre, k, by = hard_case(number, F)
        pre = pre.clamp_min(-4).repeat(mesh.data, 1)  # every place on the data axis has as many
        total = k * len(pre)
        own = mesh.own_tokens(pre)[:, mesh.rows(F)]
        dense = scattered(own, min(total, own.numel()), by)
        kept = mesh.keep_best_of_batch(Codes.every(dense), total, by, True)
        rows = mesh.gather_data(kept.to_dense())
        found = mesh.gather_latents(rows.T.contiguous()).T
        if not torch.equal(found, scattered(pre, total, by)):
            missed.append(number)
    return missed


def scattered(pre: Tensor, total: int, by: By) -> Tensor:
    values, tokens, latents = topk_batch(pre, total, by)
    return torch.zeros_like(pre).index_put_((tokens, latents), values, accumulate=True)


@pytest.mark.parametrize("axes", [(1, 2), (1, 4)], ids=str)
def test_each_token_keeps_the_best_latents_of_all(processes, axes):
    assert not any(processes.run(axes, missed_by_token, 24))


@pytest.mark.parametrize("axes", [(1, 4), (2, 2)], ids=str)
def test_a_batch_keeps_the_best_entries_of_all(processes, axes):
    assert not any(processes.run(axes, missed_by_batch, 24))


def nan_counts(mesh: Mesh) -> list[float]:
    """A token whose NaN is a value of the first share, as a failed product leaves it."""
    own = torch.tensor([[torch.nan, 1.0]] if mesh.rank == 0 else [[2.0, 1.0]])
    codes = Codes(own, torch.tensor([[0, 1]]), 2)
    return mesh.keep_best(codes, 2, "value").values[0].tolist()


def test_a_nan_is_kept_not_lost(processes):
    first, second = processes.run((1, 2), nan_counts)
    assert first[0] != first[0] and first[1:] in ([], [0.0]) and second[0] == 2.0
