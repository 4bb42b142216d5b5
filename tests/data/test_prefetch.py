"""Batches: exact resume, bad rows named, threads that end, memory that stays bounded."""

import gc
import json
import subprocess
import sys
import threading
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastsae.data import (
    ActivationShards,
    ActivationSource,
    Cursor,
    IterableProducer,
    ShardWriter,
    Stream,
)
from fastsae.data.index import sha256

N, D = 1000, 8


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ActivationShards:
    monkeypatch.setattr("fastsae.data.shards.WINDOW_BYTES", 256 * D * 4)  # several windows
    writer = ShardWriter(tmp_path, D, shard_bytes=300 * (D * 4 + 12))
    rows = torch.arange(N)
    writer.append(rows[:, None] + torch.arange(D) / 16, rows, rows, rows)
    writer.finish()
    return ActivationShards(tmp_path)


def batch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "batches"]


def edit(path: Path, row: int, value: float, honest: bool):
    """Changes one entry of a shard; an honest edit also corrects the index."""
    tensors = load_file(path)
    before = sha256(path)
    tensors["activations"][row, 1] = value
    save_file(tensors, path)
    if honest:
        index = path.with_name("index.json")
        index.write_text(index.read_text().replace(before, sha256(path)))


@pytest.mark.parametrize("done", [0, 1, 3, 7, 8, 25])
def test_resume_equals_an_uninterrupted_run(shards: ActivationShards, done: int):
    source: ActivationSource = shards
    with source.batches(128, seed=3) as batches:
        whole = list(islice(batches, 30))
    cursor = whole[done - 1].cursor if done else None
    if cursor:
        cursor = Cursor(*json.loads(json.dumps(cursor)))
    with ActivationShards(shards.path).batches(128, seed=3, cursor=cursor) as batches:
        for expected, found in zip(whole[done:], batches, strict=False):
            assert torch.equal(expected.x, found.x) and expected.cursor == found.cursor


def test_every_row_once_per_epoch_and_no_short_batch(shards: ActivationShards):
    with shards.batches(96, seed=0) as batches:
        drawn = [next(batches) for _ in range(2 * N // 96 + 1)]
    assert all(batch.x.shape == (96, D) and batch.x.dtype == torch.float32 for batch in drawn)
    stream = torch.cat([batch.x for batch in drawn])
    ids = stream[:, 0]
    assert torch.equal(stream, ids[:, None] + torch.arange(D) / 16)
    first, second = ids[:N], ids[N : 2 * N]
    for epoch in (first, second):
        assert torch.equal(epoch.sort().values, torch.arange(N).float())
    assert not torch.equal(first, second)
    assert drawn[-1].cursor == Cursor(*divmod(96 * len(drawn), N))


def test_a_batch_may_be_larger_than_the_data(shards: ActivationShards):
    with shards.batches(2 * N + 10) as batches:
        counts = next(batches).x[:, 0].long().bincount()
    assert counts.min() == 2 and counts.sum() == 2 * N + 10


def test_batches_are_the_consumers_own(shards: ActivationShards):
    with shards.batches(64) as batches:
        kept = next(batches).x
        copy = kept.clone()
        for batch in islice(batches, 40):
            batch.x.zero_()
    assert torch.equal(kept, copy)
    with shards.batches(64) as batches:
        assert torch.equal(next(batches).x, copy)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_row_is_named(shards: ActivationShards, value: float):
    edit(shards.path / "shard-00002.safetensors", 17, value, honest=True)
    with (
        ActivationShards(shards.path).batches(64) as batches,
        pytest.raises(ValueError, match=r"NaN or Inf: shard-00002\.safetensors row 17"),
    ):
        list(islice(batches, N))
    assert not batch_threads()
    with pytest.raises(ValueError, match="row 17"):  # it is raised again
        next(batches)


def test_a_bad_row_of_plain_data_is_named(tmp_path: Path):
    x = np.ones((50, 3), np.float32)
    x[20, 2] = np.nan
    np.save(tmp_path / "x.npy", x)
    shards = ActivationShards(tmp_path / "x.npy")
    for use in (lambda: shards.mean_square, lambda: shards.sample(50)):
        with pytest.raises(ValueError, match=r"NaN or Inf: x\.npy row 20"):
            use()
    with shards.batches(8) as batches, pytest.raises(ValueError, match=r"x\.npy row 20"):
        list(islice(batches, 10))


def test_an_edited_shard_of_the_right_size_is_named(shards: ActivationShards):
    edit(shards.path / "shard-00001.safetensors", 3, 0.5, honest=False)
    edited = ActivationShards(shards.path)
    message = r"shard-00001\.safetensors was modified: its SHA-256 is \w{64}, the"
    with pytest.raises(ValueError, match=message):
        edited.verify()
    with edited.batches(64) as batches, pytest.raises(ValueError, match=message):
        list(islice(batches, N))


def test_no_thread_outlives_its_batches(shards: ActivationShards):
    batches = shards.batches(64)
    next(batches)
    assert len(batch_threads()) == 1
    batches.close()
    batches.close()
    assert not batch_threads()
    with pytest.raises(ValueError, match="closed"):
        next(batches)
    abandoned = shards.batches(64)
    next(abandoned)
    del abandoned
    gc.collect()
    assert not batch_threads()


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, SystemExit])
def test_whatever_ends_the_thread_is_raised(error: type[BaseException]):
    def rows():
        yield from torch.ones(6, 10, 4)
        raise error

    with Stream(IterableProducer(rows, 10), 40).batches(8) as batches, pytest.raises(error):
        list(islice(batches, 10))
    assert not batch_threads()


def test_nonsense_is_refused(shards: ActivationShards):
    with pytest.raises(ValueError, match="at least 1, got 0"):
        shards.batches(0)
    with pytest.raises(ValueError, match="position from 0 to 999"):
        shards.batches(8, cursor=Cursor(0, N))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="needs a CUDA device"):
            shards.batches(8, pin_memory=True)
    assert not batch_threads()


MEASURE = """
import resource, sys
from fastsae.data import ActivationShards, shards
shards.WINDOW_BYTES = 8_000_000
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
data = ActivationShards(sys.argv[1])
before = peak()
data.sample(2000)
with data.batches(1024) as batches:
    for _ in range(2 * data.n_tokens // 1024):
        next(batches)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_resident_memory_is_bounded_by_the_window_not_the_data(tmp_path: Path):
    path = tmp_path / "x.npy"
    rows, width = 100_000, 384  # 154 MB
    np.lib.format.open_memmap(path, "w+", np.float32, (rows, width))[:] = 1
    run = [sys.executable, "-c", MEASURE, str(path)]
    grown = int(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    assert grown < 100_000  # KiB: a window, the batches, and what scattered faults map at once
