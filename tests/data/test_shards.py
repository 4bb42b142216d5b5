"""Shards on disk: round trips, plain files, and every way a folder can be damaged."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastsae.data import ActivationShards, ShardWriter
from fastsae.data.index import Dtype, sha256

N, D = 700, 12


def write(folder: Path, x: torch.Tensor, *, dtype: Dtype = "float32", rows_per_shard: int = 200):
    size = rows_per_shard * (x.shape[1] * getattr(torch, dtype).itemsize + 12)
    writer = ShardWriter(
        folder, x.shape[1], dtype=dtype, model="m", hookpoint="h", shard_bytes=size
    )
    for start in range(0, len(x), 64):
        part = torch.arange(start, min(start + 64, len(x)))
        writer.append(x[start : start + 64], part + 7, part % 10, part // 10)
    writer.finish()
    return ActivationShards(folder)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(N, D) * 3 + 1


def edit_index(folder: Path, **changes: object):
    path = folder / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_come_back_as_stored(tmp_path: Path, x: torch.Tensor, dtype: Dtype):
    shards = write(tmp_path, x, dtype=dtype)
    stored = x.to(getattr(torch, dtype)).float()
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    assert (shards.n_tokens, shards.d_in, shards.dtype) == (N, D, dtype)
    assert (shards.model, shards.hookpoint, shards.heldout) == ("m", "h", None)
    wanted = torch.randperm(N)
    assert torch.equal(shards.rows(wanted), stored[wanted])
    contexts = shards.contexts(wanted)
    assert torch.equal(contexts.token_ids, wanted + 7)
    assert torch.equal(contexts.positions, wanted % 10)
    assert torch.equal(contexts.documents, wanted // 10)
    shards.verify()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_statistics_are_those_of_the_stored_rows(tmp_path: Path, x: torch.Tensor, dtype: Dtype):
    shards = write(tmp_path, x, dtype=dtype)
    exact = x.to(getattr(torch, dtype)).double()
    norms = exact.norm(dim=1)
    assert shards.mean_square == pytest.approx(exact.square().mean().item(), rel=1e-12)
    assert torch.equal(shards.mean, exact.mean(0).float())
    expected = {"mean": norms.mean(), "std": norms.std(correction=0)}
    expected |= {"min": norms.min(), "max": norms.max()}
    found = vars(shards.norm)
    assert found.pop("median") == pytest.approx(norms.median().item(), rel=2**-8)
    assert found.pop("huge_fraction") == 0
    assert found == pytest.approx({k: v.item() for k, v in expected.items()}, rel=1e-9)


def test_plain_files_are_data_too(tmp_path: Path, x: torch.Tensor):
    folder = tmp_path / "folder"
    folder.mkdir()
    np.save(tmp_path / "c.npy", x.numpy())
    np.save(tmp_path / "f.npy", np.asfortranarray(x.double().numpy()))
    save_file({"acts": x}, tmp_path / "one.safetensors")
    np.save(folder / "a.npy", x[:300].numpy())
    save_file({"acts": x[300:].contiguous()}, folder / "b.safetensors")
    wanted = torch.randperm(N)
    for name in ("c.npy", "f.npy", "one.safetensors", "folder"):
        shards = ActivationShards(tmp_path / name)
        assert torch.equal(shards.rows(wanted), x[wanted])
        assert shards.mean_square == pytest.approx(x.double().square().mean().item(), rel=1e-12)
        assert (shards.model, shards.heldout) == (None, None)
    with pytest.raises(ValueError, match="plain data and has no token ids"):
        shards.contexts(wanted)
    with pytest.raises(ValueError, match="no SHA-256"):
        shards.verify()
    half = tmp_path / "half.safetensors"
    save_file({"acts": x.bfloat16()}, half)
    assert torch.equal(ActivationShards(half).rows(wanted), x.bfloat16().float()[wanted])


def test_sample_is_without_replacement_and_repeatable(tmp_path: Path, x: torch.Tensor):
    x[:, 0] = torch.arange(N)
    shards = write(tmp_path, x)
    sample = shards.sample(50, seed=1)
    assert torch.equal(sample, shards.sample(50, seed=1))
    assert not torch.equal(sample, shards.sample(50, seed=2))
    assert torch.equal(shards.sample(10 * N)[:, 0].sort().values, torch.arange(N).float())


def test_heldout_is_the_subfolder(tmp_path: Path, x: torch.Tensor):
    write(tmp_path / "heldout", x[:100])
    heldout = write(tmp_path, x).heldout
    assert heldout is not None and heldout.n_tokens == 100


def test_fingerprint_tells_data_apart(tmp_path: Path, x: torch.Tensor):
    np.save(tmp_path / "a.npy", x.numpy())
    np.save(tmp_path / "b.npy", x[1:].numpy())
    seen = [
        write(tmp_path / "one", x).fingerprint,
        write(tmp_path / "two", x + 1).fingerprint,
        ActivationShards(tmp_path / "a.npy").fingerprint,
        ActivationShards(tmp_path / "b.npy").fingerprint,
    ]
    assert len(set(seen)) == 4
    assert ActivationShards(tmp_path / "one").fingerprint == seen[0]


def test_a_killed_writer_leaves_no_index_and_its_shards_are_overwritten(
    tmp_path: Path, x: torch.Tensor
):
    writer = ShardWriter(tmp_path, D, shard_bytes=1000)
    labels = torch.arange(N)
    writer.append(x, labels, labels, labels)
    assert list(tmp_path.glob("shard-*")) and not (tmp_path / "index.json").exists()
    with pytest.raises(ValueError, match="no index.json that lists it"):
        ActivationShards(tmp_path)
    shards = write(tmp_path, x)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "index.json",
        *(f"shard-0000{i}.safetensors" for i in range(4)),
    ]
    shards.verify()
    with pytest.raises(ValueError, match="already holds activations"):
        ShardWriter(tmp_path, D)


def test_writer_refuses_what_cannot_be_trained_on(tmp_path: Path, x: torch.Tensor):
    labels = torch.arange(N)
    writer = ShardWriter(tmp_path, D, dtype="float16")
    with pytest.raises(ValueError, match="rows have 11 entries, expected 12"):
        writer.append(x[:, 1:], labels, labels, labels)
    x[5, 3] = 1e6  # infinite as float16
    with pytest.raises(ValueError, match="NaN or Inf as float16: row 5"):
        writer.append(x, labels, labels, labels)
    with pytest.raises(ValueError, match="no rows to write"):
        writer.finish()
    with pytest.raises(ValueError, match="float32, bfloat16, float16, got 'int8'"):
        ShardWriter(tmp_path, D, dtype="int8")


def damage_truncated(folder: Path):
    path = folder / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def damage_emptied(folder: Path):
    (folder / "shard-00001.safetensors").write_bytes(b"")


def damage_missing(folder: Path):
    (folder / "shard-00001.safetensors").unlink()


def damage_shorter(folder: Path):
    tensors = load_file(folder / "shard-00001.safetensors")
    cut = {name: tensor[:-1].contiguous() for name, tensor in tensors.items()}
    save_file(cut, folder / "shard-00001.safetensors")


def damage_dtype(folder: Path):
    tensors = load_file(folder / "shard-00001.safetensors")
    tensors["activations"] = tensors["activations"].half()
    save_file(tensors, folder / "shard-00001.safetensors")


def damage_header(folder: Path):
    path = folder / "shard-00001.safetensors"
    raw = bytearray(path.read_bytes())
    raw[8:12] = b"!!!!"
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncated, r"shard-00001.*: \d+ bytes expected from its header, \d+ found"),
        (damage_emptied, "shard-00001.*not a complete safetensors file"),
        (damage_missing, "shard-00001.* is missing, but index.json lists it"),
        (damage_shorter, r"shard-00001.*\(200, 12\).* expected from index.json, .*\(199, 12\)"),
        (damage_dtype, "shard-00001.*float32.* expected from index.json, .*float16.* found"),
        (damage_header, "shard-00001.*header cannot be read"),
    ],
)
def test_a_damaged_shard_is_named(tmp_path: Path, x: torch.Tensor, damage, message: str):
    write(tmp_path, x)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        ActivationShards(tmp_path)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "a/b", "..", "a\\b", ""])
def test_no_path_in_the_index_leaves_the_folder(tmp_path: Path, x: torch.Tensor, file: str):
    folder = tmp_path / "data"
    write(folder, x[:10])
    (folder / "shard-00000.safetensors").rename(tmp_path / "secret.safetensors")
    digest = sha256(tmp_path / "secret.safetensors")
    edit_index(folder, shards=[{"file": file, "tokens": 10, "sha256": digest}])
    with pytest.raises(ValueError, match="index.json.*not the name of a file in the folder"):
        ActivationShards(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 9}, "expected format version 1, found 9"),
        ({"shape": [N + 1, D]}, r"shape is \[701, 12\] but the shards hold 700 tokens"),
        ({"dtype": "int8"}, "dtype must be .*float16.*, got 'int8'"),
        ({"surprise": 1}, "surprise"),
        ({"shards": [{"file": "shard-00000.safetensors"}]}, "tokens"),
        ({"shards": []}, "it lists no shards"),
        ({"mean_square": "1"}, "mean_square must be a finite number"),
    ],
)
def test_an_edited_index_is_refused(
    tmp_path: Path, x: torch.Tensor, changes: dict[str, object], message: str
):
    write(tmp_path, x)
    edit_index(tmp_path, **changes)
    with pytest.raises(ValueError, match=f"index.json: .*{message}"):
        ActivationShards(tmp_path)


def test_a_path_that_holds_no_activations_is_refused(tmp_path: Path, x: torch.Tensor):
    np.save(tmp_path / "flat.npy", x[0].numpy())
    np.save(tmp_path / "ints.npy", np.arange(6).reshape(2, 3))
    np.save(tmp_path / "none.npy", np.empty((0, 3), np.float32))
    np.save(tmp_path / "pickled.npy", np.array([[None]]), allow_pickle=True)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "flat.npy").read_bytes()[:-4])
    (tmp_path / "not.json").write_text("{")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "index.json").write_text("{")
    (tmp_path / "mixed").mkdir()
    np.save(tmp_path / "mixed" / "a.npy", x.numpy())
    np.save(tmp_path / "mixed" / "b.npy", x[:, 1:].numpy())
    for name, message in {
        "absent": "does not exist",
        "flat.npy": r"expected a two-dimensional float array, found shape \(12,\)",
        "ints.npy": "holds dtype int64, allowed are float16, float32, float64",
        "none.npy": "none.npy",
        "pickled.npy": "not a valid .npy file of numbers",
        "cut.npy": "not a valid .npy file of numbers",
        "not.json": "plain data is .npy or .safetensors",
        "empty": "neither an index.json nor .npy or .safetensors files",
        "bad": "index.json is not a JSON file",
        "mixed": "b.npy: width and dtype are .*11.*those of a.npy",
    }.items():
        with pytest.raises(ValueError, match=message):
            ActivationShards(tmp_path / name)


def test_rows_out_of_range_are_refused(tmp_path: Path, x: torch.Tensor):
    shards = write(tmp_path, x)
    for index in (-1, N):
        with pytest.raises(ValueError, match="rows must be from 0 to 699"):
            shards.rows(torch.tensor([0, index]))
