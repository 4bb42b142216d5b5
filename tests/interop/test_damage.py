"""Files that are damaged, or made to harm: a ValueError that names them, and nothing executed."""

import json
import os
import pickle
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import fastsae
from fastsae import SAE, TopK, interop
from fastsae.files import read_tensors

D_IN, D_SAE, K = 6, 10, 3
FORMS = "sae_lens", "sparsify", "dictionary_learning", "gemma_scope", "openai"


def sound(form: str, folder: Path) -> Path:
    """A whole file of that form; what to load."""
    sae = SAE(D_IN, D_SAE, TopK(K))
    if form == "gemma_scope":
        arrays = {"W_enc": sae.W_enc.T, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
        arrays["threshold"] = torch.ones(D_SAE)
        folder.mkdir()
        np.savez(folder / "params.npz", **{n: t.detach().numpy() for n, t in arrays.items()})
        return folder
    if form == "openai":
        names = {"encoder.weight": sae.W_enc, "decoder.weight": sae.W_dec.T.contiguous()}
        names |= {"latent_bias": sae.b_enc, "pre_bias": sae.b_dec}
        folder.mkdir()
        torch.save({n: t.detach() for n, t in names.items()}, folder / "sae.pt")
        return folder / "sae.pt"
    interop.save(sae, folder, form)
    return folder


def files_of(form: str, path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return [path / name for name in interop.FORMATS[form].files]


def refused(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        fastsae.load(path)
    return str(caught.value)


@contextmanager
def taking_at_most(megabytes: int) -> Iterator[None]:
    """Of memory, at any time while it runs; measured where Linux can say so."""
    if not sys.platform.startswith("linux"):
        yield
        return
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    before = resident("VmRSS")
    yield
    assert resident("VmHWM") - before < megabytes


def resident(what: str) -> float:
    """Megabytes of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(what)]
    return int(line.split()[1]) / 1024


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
                continue  # but for its last line's end, it is all there
            file.write_bytes(whole[:length])
            assert str(file) in refused(path) or "holds no SAE" in refused(path)
        file.write_bytes(whole)
    fastsae.load(path)


@pytest.mark.parametrize("form", FORMS)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_bytes_changed_at_random(form, data, tmp_path_factory):
    """Read, or refused with a ValueError: nothing else."""
    path = sound(form, tmp_path_factory.mktemp("fuzz") / "sae")
    file = data.draw(st.sampled_from(files_of(form, path)))
    damaged = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        place = data.draw(st.integers(0, len(damaged) - 1))
        damaged[place] = data.draw(st.integers(0, 255))
    file.write_bytes(damaged)
    try:
        fastsae.load(path)
    except ValueError as error:
        assert str(error)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


@pytest.mark.parametrize("form", FORMS[:3])
@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_settings_changed_at_random(form, data, tmp_path_factory):
    path = sound(form, tmp_path_factory.mktemp("fuzz") / "sae")
    (file,) = [file for file in files_of(form, path) if file.suffix == ".json"]
    config = json.loads(file.read_text())
    part = config.get("trainer", config)
    name = data.draw(st.sampled_from(sorted(part)))
    part[name] = data.draw(JSON)
    file.write_text(json.dumps(data.draw(st.sampled_from([config, part[name]]))))
    try:
        fastsae.load(path)
    except ValueError as error:
        assert str(error)


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
    with taking_at_most(16):
        assert f"holds {64 << 20} bytes in a file of" in refused(path)


def test_a_state_dict_that_claims_to_be_larger_than_it_is(tmp_path):
    path = sound("openai", tmp_path / "sae")
    state = torch.load(path)
    for extra, said in {
        torch.zeros(1).expand(8000, 8000): "its tensors are larger than the file",
        Buffer(300_000_000): "it holds __builtin__ bytearray",
    }.items():
        torch.save(state | {"extra": extra}, path)
        with taking_at_most(32):
            assert said in refused(path)


class Buffer:
    """So many bytes, when it is unpickled."""

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
