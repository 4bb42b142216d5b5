"""Files that are damaged, or made to harm: a ValueError that names them, and nothing executed."""

import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import fastsae
from fastsae import interop
from fastsae.files import read_tensors

from .fuzz import D_IN, D_SAE, FORMS, measured, sound


def files_of(form: str, path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return [path / name for name in interop.FORMATS[form].files]


def refused(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        fastsae.load(path)
    return str(caught.value)


MKDIR = f"{os.name} mkdir"


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["dictionary_learning", "openai"])
def test_pickles_are_not_executed(form, tmp_path):
    path = sound(form, tmp_path / "sae")
    file = files_of(form, path)[-1]
    state = torch.load(file)
    torch.save(state | {"extra": Payload(tmp_path / "owned")}, file)
    assert refused(path).endswith("is not a zip archive of plain tensors: it holds " + MKDIR)
    file.write_bytes(pickle.dumps(Payload(tmp_path / "owned")))
    assert "is not a zip archive" in refused(path)
    torch.save(state, file, _use_new_zipfile_serialization=False)
    assert "is not a zip archive" in refused(path)
    assert not (tmp_path / "owned").exists()


def test_objects_in_arrays_are_not_executed(tmp_path):
    path = sound("gemma_scope", tmp_path / "sae")
    arrays = dict(np.load(path / "params.npz"))
    arrays["extra"] = np.array([Payload(tmp_path / "owned")], dtype=object)
    np.savez(path / "params.npz", **arrays)
    assert "extra.npy is not a complete numeric array" in refused(path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("form", FORMS)
def test_a_file_cut_anywhere(form, tmp_path):
    path = sound(form, tmp_path / "sae")
    for file in files_of(form, path):
        whole = file.read_bytes()
        for length in sorted({0, 1, 8, *range(20, len(whole), max(1, len(whole) // 12))}):
            if whole[:length].strip() == whole.strip():
                continue  # only the final newline is missing
            file.write_bytes(whole[:length])
            assert str(file) in refused(path) or "holds no SAE" in refused(path)
        file.write_bytes(whole)
    fastsae.load(path)


@pytest.mark.parametrize("form", FORMS[:3])
def test_sizes_that_the_tensors_do_not_have(form, tmp_path):
    path = sound(form, tmp_path / "sae")
    (file,) = [file for file in files_of(form, path) if file.suffix == ".json"]
    names = {"sae_lens": "d_sae", "sparsify": "num_latents", "dictionary_learning": "k"}
    if form == "dictionary_learning":  # the k of older files is the config's
        state = torch.load(path / "ae.pt")
        torch.save({n: t for n, t in state.items() if n != "k"}, path / "ae.pt")
    text = file.read_text()
    for value in (10**12, -1, 0, 10**40):
        config = json.loads(text)
        config.get("trainer", config)[names[form]] = value
        file.write_text(json.dumps(config))
        if form != "sparsify" or value != 0:  # 0 stands for d_in * expansion_factor there
            assert str(path) in refused(path)


@pytest.mark.parametrize("form", FORMS[:3])
def test_json_bombs(form, tmp_path):
    path = sound(form, tmp_path / "sae")
    (file,) = [file for file in files_of(form, path) if file.suffix == ".json"]
    for bomb in ("[" * 200_000, '{"a":' * 100_000, "9" * 900_000, " " * (2 << 20)):
        file.write_text(bomb)
        assert f"{file} is not a JSON file" in refused(path)


def test_weights_that_are_no_weights(tmp_path):
    path = sound("sparsify", tmp_path / "sae")
    weights = {n: t.clone() for n, t in read_tensors(path / "sae.safetensors").items()}
    for name, tensor, said in [
        ("W_dec", torch.zeros(D_SAE, D_IN, dtype=torch.int64), "must be floating point"),
        ("W_dec", torch.zeros(D_IN, D_SAE), rf"must be [{D_SAE}, {D_IN}]"),
        ("b_dec", torch.zeros(1, D_IN), f"must be [{D_IN}]"),
        ("encoder.weight", torch.zeros(()), f"must be [{D_SAE}, {D_IN}], got []"),
    ]:
        save_file({**weights, name: tensor}, path / "sae.safetensors")
        assert f"{name} {said}" in refused(path)
    save_file({n: t for n, t in weights.items() if n != "b_dec"}, path / "sae.safetensors")
    assert "lacks b_dec: it holds ['W_dec', 'encoder.bias', 'encoder.weight']" in refused(path)


@pytest.mark.parametrize("form", ["gemma_scope", "openai"])
def test_an_archive_that_expands(form, tmp_path):
    """It is refused by its directory, before anything of it is read."""
    path = sound(form, tmp_path / "sae")
    with (
        zipfile.ZipFile(files_of(form, path)[0], "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("W_enc.npy", "w") as file,
    ):
        for _ in range(64):
            file.write(bytes(1 << 20))
    with measured(16):
        assert f"holds {64 << 20} bytes in a file of" in refused(path)


def test_a_state_dict_that_claims_to_be_larger_than_it_is(tmp_path):
    path = sound("openai", tmp_path / "sae")
    state = torch.load(path)
    for extra, said in {
        torch.zeros(1).expand(8000, 8000): "its tensors are larger than the file",
        Buffer(300_000_000): "it holds __builtin__ bytearray",
    }.items():
        torch.save(state | {"extra": extra}, path)
        with measured(32):
            assert said in refused(path)


class Nested:
    """Nests this many levels, each with two references to the next, in lists or in keys."""

    def __init__(self, kind: type, levels: int):
        self.value: Any = "x"
        for _ in range(levels):
            self.value = kind([self.value, self.value])


def repickled(path: Path, pickle_bytes: bytes) -> None:
    """Replace the pickle in a .pt file."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, entry in entries.items():
            archive.writestr(name, pickle_bytes if name.endswith("data.pkl") else entry)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"activation": Nested(list, 60).value}, "activation must be ReLU or TopK, got [["),
        ({"activation": Nested(tuple, 60).value}, "activation must be ReLU or TopK, got (("),
        (b"\x80\x02}X\x01\x00\x00\x00a" + b")" + b"\x85" * 60_000 + b"s.", "it lacks latent_bias"),
        (b"\x80\x02})" + b"\x85q\x00h\x00\x86" * 40 + b"K\x01s.", "it has tuple in place of str"),
        (b"\x80\x02}" + b"]" * 70_000 + b".", "its pickle has 70004 bytes, allowed are 65536"),
        (b"\x80\x02\x8a\xff" + b"\x7f" * 255 + b".", "it holds an integer beyond 64 bits"),
    ],
    ids=["lists", "tuples", "depth", "key", "length", "integer"],
)
def test_pickles_that_nest_or_repeat_without_end(damage, message, tmp_path):
    path = sound("openai", tmp_path)
    if isinstance(damage, dict):
        torch.save(torch.load(path) | damage, path)
    else:
        repickled(path, damage)
    with measured(32):
        assert message in refused(path)


def test_a_zip_entry_that_inflates_to_more_than_its_directory_says(tmp_path):
    path = sound("openai", tmp_path)
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("sae/data.pkl", "w") as file,
    ):
        for _ in range(64):
            file.write(bytes(1 << 20))
    content = bytearray(path.read_bytes())
    place = content.rfind(b"PK\x01\x02") + 24
    content[place : place + 4] = (100).to_bytes(4, "little")
    path.write_bytes(content)
    with measured(16):
        assert "Bad CRC-32" in refused(path)


def test_archives_that_zipfile_would_read_whole(tmp_path):
    """Those of other methods than deflate, and with a directory of millions of entries."""
    path = sound("openai", tmp_path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("sae/data.pkl", bytes(1 << 24))
    with measured(16):
        assert "compressed by another method than deflate" in refused(path)
    count, entry = 200_000, b"PK\x01\x02" + bytes(42)
    end = b"PK\x05\x06" + bytes(8) + (46 * count).to_bytes(4, "little") + bytes(6)
    path.write_bytes(entry * count + end)
    with measured(32):
        assert f"its directory has {46 * count} bytes" in refused(path)


def test_flipped_bits_in_archives_are_refused(tmp_path):
    for form in ("gemma_scope", "openai"):
        path = sound(form, tmp_path / form)
        (file,) = files_of(form, path)
        content, weights = file.read_bytes(), fastsae.load(path).W_dec.detach()
        held = weights.T.contiguous() if form == "openai" else weights
        place = content.index(held.numpy().tobytes()) + 5
        for bit in range(8):
            flipped = bytearray(content)
            flipped[place] ^= 1 << bit
            file.write_bytes(flipped)
            assert "Bad CRC-32" in refused(path)


class Buffer:
    """Unpickles to that many bytes."""

    def __init__(self, size: int):
        self.size = size

    def __reduce__(self):
        return bytearray, (self.size,)


def test_an_array_that_claims_to_be_larger_than_it_is(tmp_path):
    path = sound("gemma_scope", tmp_path / "sae")
    header = np.lib.format.magic(1, 0)
    with zipfile.ZipFile(path / "params.npz", "w") as archive, archive.open("W_enc.npy", "w") as f:
        shape = {"descr": "<f4", "fortran_order": False, "shape": (10**9, 10**6)}
        text = (repr(shape) + "\n").encode()
        f.write(header + len(text).to_bytes(2, "little") + text + bytes(64))
    assert "W_enc.npy is not a complete numeric array" in refused(path)
