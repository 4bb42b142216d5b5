"""Activations in memory: every dtype, held-out rows, and what is refused."""

from itertools import islice

import numpy as np
import pytest
import torch

from fastsae.data import ActivationArray, ActivationSource, Contexts

N, D = 300, 5


def rows() -> torch.Tensor:
    return torch.randn(N, D)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
)
def test_rows_of_any_dtype_are_read_as_float32(dtype):
    x = rows().to(dtype)
    source: ActivationSource = ActivationArray(x)
    wanted = torch.tensor([7, 0, 299, 7])
    assert torch.equal(source.rows(wanted), x.float()[wanted])
    with source.batches(100, seed=1) as batches:
        epoch = torch.cat([batch.x for batch in islice(batches, 3)])
    assert torch.equal(epoch.unique(dim=0), x.float().unique(dim=0))
    if dtype not in (torch.bfloat16, torch.float8_e4m3fn):
        array = x.numpy()
        array.flags.writeable = False
        for equal in (ActivationArray(array), ActivationArray(x.T.contiguous().T)):
            assert torch.equal(equal.rows(wanted), x.float()[wanted])
    big_endian = x.double().numpy().astype(">f8")
    assert torch.equal(ActivationArray(big_endian).rows(wanted), x.float()[wanted])


def test_every_value_is_in_the_fingerprint():
    x = rows()
    before = ActivationArray(x).fingerprint
    assert before == ActivationArray(x.clone()).fingerprint != ActivationArray(x[1:]).fingerprint
    x[N - 1, D - 1] += 1
    assert ActivationArray(x).fingerprint != before


def test_a_fraction_sets_the_last_rows_aside():
    x, labels = rows(), torch.arange(N)
    source = ActivationArray(x, Contexts(labels, labels, labels), 0.05, model="m")
    assert source.n_tokens == 285 and isinstance(source.heldout, ActivationArray)
    assert torch.equal(source.heldout.rows(torch.arange(15)), x[285:])
    assert source.heldout.contexts(torch.tensor([2])).documents == 287
    assert source.heldout.model == "m" and source.heldout.where(2) == "row 287"
    assert ActivationArray(x[:19], heldout=0.05).heldout is None


def test_a_memory_mapped_array_resumes_and_is_known_by_its_file(tmp_path):
    np.save(tmp_path / "acts.npy", rows().numpy())
    mapped = [np.load(tmp_path / "acts.npy", mmap_mode="r") for _ in range(2)]
    first, again = map(ActivationArray, mapped)
    assert first.fingerprint == again.fingerprint != ActivationArray(mapped[0][1:]).fingerprint
    with first.batches(128, seed=3) as batches:
        whole = [*islice(batches, 5)]
    with again.batches(128, seed=3, cursor=whole[2].cursor) as batches:
        assert all(torch.equal(a.x, b.x) for a, b in zip(whole[3:], batches, strict=False))
    assert first.where(4) == "acts.npy row 4"


def test_a_row_with_nan_is_named():
    x = rows()
    x[290, 1] = torch.nan
    source = ActivationArray(x, heldout=0.05)
    source.sample(N)
    assert source.heldout is not None
    with pytest.raises(ValueError, match="data holds NaN or Inf: row 290"):
        source.heldout.sample(N)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 3, 4), r"of shape \(2, 3, 4\); flatten .* x.reshape\(-1, x.shape\[-1\]\)"),
        (torch.zeros(4), r"got torch.float32 of shape \(4,\)$"),
        (torch.zeros(4, 4, dtype=torch.int64), r"got torch.int64 of shape \(4, 4\)$"),
        (np.zeros((0, 4)), r"got float64 of shape \(0, 4\)$"),
    ],
)
def test_other_arrays_are_refused(x, message):
    with pytest.raises(ValueError, match=message):
        ActivationArray(x)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="heldout must be a fraction below 1, got 1.5"):
        ActivationArray(rows(), heldout=1.5)
    short = torch.arange(N - 1)
    with pytest.raises(ValueError, match=r"contexts must have 300 entries, like x, got \[299\]"):
        ActivationArray(rows(), Contexts(short, short, short))
