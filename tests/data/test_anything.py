"""Whatever holds or yields activations can be trained on."""

from collections.abc import Callable
from functools import wraps
from itertools import islice
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from fastsae.data import (
    ActivationArray,
    ActivationShards,
    IterableProducer,
    Producer,
    Stream,
    Synthetic,
    VllmHiddenStates,
    as_source,
)
from fastsae.data.producer import Part

N, D, BATCH = 400, 4, 10
X = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
LABELS = TensorDataset(X, torch.arange(N))


def batches():
    yield from X.split(BATCH)


class Rows(IterableDataset):
    def __iter__(self):
        yield from X


def columns(kind: str | None) -> datasets.Dataset:
    found = datasets.Dataset.from_dict({"acts": X.tolist(), "token": [*range(N)]})
    return found if kind is None else found.with_format(kind)


def rows_of(producer: Producer, part: Part = "train") -> torch.Tensor:
    return torch.cat([group.rows[0] for group in producer.groups((), part)])


def sorted_rows(x: torch.Tensor) -> torch.Tensor:
    return x[x[:, 0].argsort()]


@pytest.mark.parametrize(
    ("given", "heldout"),
    [
        (batches, 20),
        (batches(), 20),
        ([*batches()], 20),
        (lambda: ({"acts": x.numpy(), "token_ids": torch.arange(len(x))} for x in batches()), 20),
        (DataLoader(LABELS, BATCH), 20),
        (DataLoader(LABELS, BATCH, shuffle=True), 0),
        (DataLoader(Rows(), BATCH), 20),
        (LABELS, 20),
        (Rows(), 20),
        (columns(None)["acts"], 0),  # in slices, of which there are few
        (columns("torch")["acts"], 0),
        (columns("numpy"), 0),
        (datasets.Dataset.from_dict({"acts": [x.tolist() for x in batches()]})["acts"], 20),
    ],
)
def test_what_yields_rows_becomes_a_stream_of_all_of_them(given, heldout):
    source = as_source(given)
    assert isinstance(source, Stream) and source.d_in == D
    assert torch.equal(sorted_rows(rows_of(source.producer)), sorted_rows(X[heldout:]))
    aside = source.heldout
    kept = aside.rows(torch.arange(aside.n_tokens)) if aside else torch.empty(0, D)
    assert torch.equal(kept, X[:heldout])
    source.sample(N)
    with source.batches(N) as found:
        assert torch.isin(next(found).x, X[heldout:]).all()


def long(rows: int = 10_000) -> Callable:
    x = torch.arange(rows * 2.0).view(rows, 2)
    return lambda: iter(x.split(500))


def test_the_first_batches_of_unknown_length_are_held_out_until_there_are_enough():
    producer = IterableProducer(long())
    held, rest = rows_of(producer, "heldout"), rows_of(producer)
    assert len(held) == 4500, "in whole batches"
    assert torch.equal(torch.cat([held, rest])[:, 0], torch.arange(0, 20_000, 2.0))
    assert torch.equal(rows_of(producer, "both"), torch.cat([held, rest]))
    assert not [*IterableProducer(long(), heldout_tokens=0).groups((), "heldout")]


def test_groups_continue_from_any_place():
    whole = [*IterableProducer(long()).groups()]
    for done in range(len(whole)):
        found = [*IterableProducer(long()).groups(whole[done].next)]
        assert [g.next for g in found] == [g.next for g in whole[done + 1 :]]
        for a, b in zip(found, whole[done + 1 :], strict=True):
            assert torch.equal(a.rows[0], b.rows[0])


def test_a_stream_over_a_function_resumes_exactly():
    def source():
        return Stream(IterableProducer(long()), buffer_tokens=2000)

    assert source().fingerprint == source().fingerprint
    with source().batches(300, seed=2) as found:
        whole = [*islice(found, 30)]  # more than an epoch
    for done in (3, 17, 25):
        resumed = source()
        resumed.sample(10)
        with resumed.batches(300, seed=2, cursor=whole[done - 1].cursor) as found:
            for a, b in zip(whole[done:], found, strict=False):
                assert torch.equal(a.x, b.x)


def test_a_generator_runs_once():
    source = Stream(IterableProducer(long()()), buffer_tokens=2000)
    assert source.heldout is not None
    source.sample(100)
    with (
        source.batches(500) as found,
        pytest.raises(ValueError, match="runs only once .*: pass a function that returns one"),
    ):
        seen = sum(len(next(found).x) for _ in range(20))
        assert seen < 5500
    with pytest.raises(ValueError, match="heldout_tokens must be at least 1, got 0"):
        IterableProducer(long()(), heldout_tokens=0)


def test_files_and_arrays(tmp_path):
    np.save(tmp_path / "a.npy", X.numpy())
    save_file({"x": X}, tmp_path / "a.safetensors")
    torch.save(X.to(torch.bfloat16), tmp_path / "a.pt")
    for name in ("a.npy", "a.safetensors", "a.pt"):
        source = as_source(str(tmp_path / name))
        assert source.heldout is None
        assert isinstance(source, ActivationArray if name == "a.pt" else ActivationShards)
        read = source.rows(torch.arange(N))
        assert torch.equal(read, X.to(torch.bfloat16).float() if name == "a.pt" else X)
    for x in (X, X.numpy()):
        source = as_source(x)
        assert isinstance(source, ActivationArray) and source.n_tokens == N - N // 20
        assert source.heldout is not None and source.heldout.n_tokens == N // 20


def test_a_decorator_may_give_a_function_its_arguments():
    def rows(size: int):
        yield from X.split(size)

    given = wraps(rows)(lambda: rows(BATCH))
    assert as_source(given).sample(3).shape == (3, D)


def test_sources_and_producers():
    synthetic = Synthetic(d_in=4, n_latents=4, active=1)
    stream = Stream(IterableProducer(batches))
    assert as_source(synthetic) is synthetic and as_source(stream) is stream
    producer = IterableProducer(batches)
    made = as_source(producer)
    assert isinstance(made, Stream) and made.producer is producer


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, r"^cannot train on int; give a tensor or array \[tokens, d_in\]; a path .*Source$"),
        (torch.nn.Sequential(), "^cannot train on Sequential; give a tensor"),
        (lambda: 3, "^the function must return an iterable of batches, got int$"),
        ([], "^there are no activations: no batch has a row$"),
        (lambda x: [x], "^the function must work without arguments: missing .* 'x'$"),
        ({"train": X, "test": X}, "^cannot train on dict; give one of its values: 'train', 'test'"),
        (X.to_sparse(), "^activations must be a dense tensor .* layout torch.sparse_coo$"),
        (X.to("meta"), "^activations must be a dense tensor .* the meta device$"),
        ([(X, X)], r"got tuple of torch.float32 \[400, 4\], torch.float32 \[400, 4\]$"),
        ([torch.zeros(2, 3, 4)], "flatten the dimensions before the last"),
        ([[X[0]] * 9], r"got list of torch.float32 \[4\], (.* \[4\], ){2}.* \[4\] and 5 more$"),
        ([[[0.5, 1.0], [2.0]]], "^rows that are lists of floats must have one length, and none "),
        ([{"acts": [X[0], X[0, :3]]}], r"^batch 0 must have rows of one length, got \[3, 4\]$"),
        ([torch.arange(3)], r"got Tensor of torch.int64 \[3\]$"),
    ],
)
def test_anything_else_is_one_line_that_says_what_works(given: Any, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        as_source(given)
    assert "\n" not in str(caught.value)


def test_rows_of_a_column_that_differ_in_length_are_refused():
    uneven = datasets.Dataset.from_dict({"acts": [[0.5] * (4 + row // 200) for row in range(300)]})
    for form in ("torch", "numpy"):
        dataset = uneven.with_format(form)
        for given in (dataset, dataset["acts"]):
            with pytest.raises(ValueError, match="batch 1 must have rows of one length"):
                as_source(given).sample(1)


def test_bad_rows_are_named():
    nan, narrow = X.clone(), [*X.split(BATCH), torch.zeros(3, D - 1)]
    nan[205, 1] = torch.inf
    for given, message in [
        ([*nan.split(BATCH)], "batch 20 holds NaN or Inf in row 5"),
        (narrow, "batch 40 has width 3, earlier ones have 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            as_source(given).sample(1)


def test_a_tensor_file_is_not_unpickled(tmp_path):
    for content, message in [
        ({"x": X}, "it has dict in place of Tensor"),
        (torch.arange(3), r"a.pt: activations must be a float array .* got torch.int64"),
        (datasets.Version("1.0.0"), "is not a zip archive of plain tensors: it holds datasets"),
    ]:
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(ValueError, match=message):
            as_source(tmp_path / "a.pt")


def test_a_folder_of_vllm(tmp_path):
    for number in range(2):
        states = {"hidden_states": torch.randn(5, 1 + number, D), "token_ids": torch.arange(5)}
        (tmp_path / f"{number}").mkdir()
        save_file(states, tmp_path / f"{number}" / "cmpl-0-a.safetensors")
    source = as_source(tmp_path / "0")
    assert isinstance(source, Stream) and isinstance(source.producer, VllmHiddenStates)
    with pytest.raises(ValueError, match="layer must be from 0 to 1, got None"):
        as_source(tmp_path / "1")
