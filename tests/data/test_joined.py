"""Several activations of the same tokens: one order for all, and every way they can disagree."""

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastsae.data import ActivationShards, ActivationSource, Cursor, Joined, ShardWriter, Synthetic
from fastsae.data.index import Dtype, sha256

N = 1000
WIDTHS = (5, 8, 3)
MADE = Synthetic(d_in=3, n_latents=7, active=2, n_tokens=N, part="heldout")


def values(width: int, n: int = N) -> torch.Tensor:
    """Row numbers that say which source they are of; exact in half precision."""
    return (torch.arange(n)[:, None] * torch.ones(width)) + width / 2**9


def write(folder: Path, x: torch.Tensor, dtype: Dtype = "float32", shift: int = 0):
    """Shards of 300 rows that hold x, of the tokens `shift`, `shift` + 1, and so on."""
    size = 300 * (x.shape[1] * getattr(torch, dtype).itemsize + 12)
    writer = ShardWriter(folder, x.shape[1], dtype=dtype, shard_bytes=size)
    rows = torch.arange(len(x))
    writer.append(x, rows + shift, rows % 10, rows // 10)
    writer.finish()


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Shards `a` and `b` of one text in different widths and dtypes; windows of 256 rows."""
    monkeypatch.setattr("fastsae.data.joined.WINDOW_BYTES", 256 * sum(WIDTHS) * 4)
    made: list[tuple[str, int, Dtype]] = [("a", 5, "float32"), ("b", 8, "float16")]
    for name, width, dtype in made:
        write(tmp_path / name / "heldout", values(width, 90), dtype)
        write(tmp_path / name, values(width), dtype)
    return tmp_path


def joined(folders: Path) -> Joined:
    return Joined(ActivationShards(folders / "a"), ActivationShards(folders / "b"), MADE)


def expected() -> torch.Tensor:
    parts = [values(5), values(8).half().float(), MADE.rows(torch.arange(N))]
    return torch.cat(parts, 1)


def test_rows_are_those_of_all_sources(folders: Path):
    data: ActivationSource = joined(folders)
    assert isinstance(data, Joined) and data.widths == WIDTHS
    assert (data.d_in, data.n_tokens) == (16, N)
    wanted = torch.randperm(N)[:50]
    assert torch.equal(data.rows(wanted), expected()[wanted])
    parts = data.rows(wanted).split(list(data.widths), 1)
    for part, source in zip(parts, data.sources, strict=True):
        assert torch.equal(part, source.rows(wanted))
    assert torch.equal(data.contexts(wanted).token_ids, wanted)


def test_a_sample_is_of_whole_rows_without_replacement(folders: Path):
    data = joined(folders)
    sample = data.sample(60, seed=1)
    assert torch.equal(sample, data.sample(60, seed=1))
    assert not torch.equal(sample, data.sample(60, seed=2))
    rows = sample[:, 0].long()
    assert len(rows.unique()) == 60 and torch.equal(sample, expected()[rows])
    assert data.sample(10 * N).shape == (N, 16)


def test_heldout_is_joined_too(folders: Path):
    assert joined(folders).heldout is None  # the third source has none
    heldout = Joined(*joined(folders).sources[:2]).heldout
    assert heldout is not None and (heldout.n_tokens, heldout.widths) == (90, (5, 8))
    small = Synthetic(d_in=2, n_latents=4, active=1, n_tokens=50)
    both = Joined(small, small).heldout
    assert both is not None and both.heldout is None
    assert Joined(both, both).heldout is None
    nested = Joined(Joined(small, small), small)
    assert nested.widths == (4, 2) and nested.heldout is not None


def test_fingerprint_tells_data_and_order_apart(folders: Path):
    a, b, _ = joined(folders).sources
    seen = [Joined(*sources).fingerprint for sources in ((a,), (b,), (a, b), (b, a), (a, b, a))]
    assert len(set(seen)) == 5
    assert joined(folders).fingerprint == joined(folders).fingerprint


@pytest.mark.parametrize("done", [0, 1, 3, 7, 8, 25])
def test_resume_equals_an_uninterrupted_run(folders: Path, done: int):
    with joined(folders).batches(128, seed=3) as batches:
        whole = list(islice(batches, 30))
    cursor = whole[done - 1].cursor if done else None
    if cursor:
        cursor = Cursor(*json.loads(json.dumps(cursor)))
    with joined(folders).batches(128, seed=3, cursor=cursor) as batches:
        for before, found in zip(whole[done:], batches, strict=False):
            assert torch.equal(before.x, found.x) and before.cursor == found.cursor


def test_batches_hold_the_same_rows_of_every_source(folders: Path):
    with joined(folders).batches(96, seed=0) as batches:
        drawn = [next(batches) for _ in range(2 * N // 96 + 1)]
    everything = expected()
    for batch in drawn:
        assert batch.x.dtype == torch.float32 and batch.x.shape == (96, 16)
        assert torch.equal(batch.x, everything[torch.from_numpy(batch.rows)])
    stream = torch.cat([batch.x[:, 0] for batch in drawn]).long()
    for epoch in (stream[:N], stream[N : 2 * N]):
        assert torch.equal(epoch.sort().values, torch.arange(N))
    assert not torch.equal(stream[:N], stream[N : 2 * N])


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_bad_row_is_named_with_its_source(folders: Path, value: float):
    path = folders / "b" / "shard-00002.safetensors"
    tensors, before = load_file(path), sha256(path)
    tensors["activations"][17, 1] = value
    save_file(tensors, path)
    index = path.with_name("index.json")  # an honest edit
    index.write_text(index.read_text().replace(before, sha256(path)))
    data = joined(folders)
    message = r"NaN or Inf: source 2 of 3, shard-00002\.safetensors row 17"
    with data.batches(64) as batches, pytest.raises(ValueError, match=message):
        list(islice(batches, N))
    with pytest.raises(ValueError, match=message):
        data.sample(N)


def test_a_row_is_named_by_its_largest_entry(folders: Path):
    assert joined(folders).where(301) == "source 1 of 3, shard-00001.safetensors row 1"
    assert joined(folders).where(2) == "source 2 of 3, shard-00000.safetensors row 2"
    assert Joined(MADE).where(4) == "source 1 of 1, synthetic row 4"


def test_other_tokens_are_refused(folders: Path):
    write(folders / "shifted", values(4), shift=1)
    write(folders / "fewer", values(4, 999))
    a, b, made = joined(folders).sources
    with pytest.raises(ValueError, match="at least one source"):
        Joined()
    with pytest.raises(ValueError, match=r"same number of rows, got \[1000, 999\]"):
        Joined(a, ActivationShards(folders / "fewer"))
    shifted = ActivationShards(folders / "shifted")
    with pytest.raises(ValueError, match="same order: sources 1 and 3 differ in row 0"):
        Joined(a, made, shifted)
    with pytest.raises(ValueError, match="same order: sources 1 and 2 differ in row 0"):
        Joined(Joined(made, b), shifted)
    with pytest.raises(ValueError, match="rows must be from 0 to 999"):
        Joined(a, b).rows(torch.tensor([N]))


def test_other_heldout_tokens_are_refused(folders: Path):
    write(folders / "c" / "heldout", values(4, 90), shift=5)
    write(folders / "c", values(4))
    with pytest.raises(ValueError, match="held-out parts: .* differ in row 0"):
        Joined(ActivationShards(folders / "a"), ActivationShards(folders / "c"))


def test_plain_data_says_nothing_of_its_tokens(folders: Path):
    np.save(folders / "x.npy", values(4).numpy())
    plain = ActivationShards(folders / "x.npy")
    assert not plain.has_contexts and not Joined(plain, MADE).has_contexts
    assert Joined(plain, ActivationShards(folders / "a")).has_contexts
    assert Joined(plain, ActivationShards(folders / "a")).heldout is None
    with pytest.raises(ValueError, match="none of the joined sources has token ids"):
        Joined(plain, MADE).contexts(torch.tensor([0]))
