import json
import os
import stat
import struct
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest
import torch

from fastsae import SAE, TopK, interop
from fastsae.data.mapped import map_safetensors
from fastsae.files import (
    claimed,
    is_sealed,
    read_json,
    read_tensors,
    sealed,
    write_atomically,
    write_json,
    write_tensors,
)


def test_round_trips(tmp_path):
    write_json(tmp_path / "a.json", {"x": [1, 2.5, None]})
    assert read_json(tmp_path / "a.json") == {"x": [1, 2.5, None]}
    tensors = {"w": torch.randn(3, 4), "n": torch.arange(5)}
    write_tensors(tmp_path / "a.safetensors", tensors)
    found = read_tensors(tmp_path / "a.safetensors")
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, 1)

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert read_json(path) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_state_dict_that_does_not_fit_on_the_disk_is_named(tmp_path):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match=r"ae.pt cannot be written: File too large"):
            interop.save(SAE(32, 64, TopK(3)), tmp_path, "dictionary_learning")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_a_rename_that_fails_names_its_own_file(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(OSError, match=r"config.json cannot be written: "):
        SAE(4, 8, TopK(3)).save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_damage_names_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"a.json does not exist"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"a.json is not a JSON file"):
        read_json(tmp_path / "a.json")
    path = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match=r"a.safetensors does not exist"):
        read_tensors(path)
    write_tensors(path, {"w": torch.randn(100)})
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"a.safetensors is not a complete safetensors file"):
        read_tensors(path)


def test_no_directory_is_opened_where_none_can_be(tmp_path, monkeypatch):
    def refuse(path, *arguments):
        raise PermissionError(f"a directory cannot be opened: {path}")

    monkeypatch.delattr(os, "O_DIRECTORY")
    monkeypatch.setattr(os, "open", refuse)
    write_json(tmp_path / "a.json", 1)
    assert read_json(tmp_path / "a.json") == 1


FORK = get_context("fork")  # a process that imports nothing is there at once


def claim(folder: Path, answer: Connection, seconds: float) -> None:
    with claimed(folder) as mine:
        answer.send(mine)
        time.sleep(seconds)


def claiming(folder: Path, seconds: float = 0.0) -> tuple[ForkProcess, bool]:
    """A process that holds the folder for so long, if it gets it."""
    answer, theirs = FORK.Pipe()
    process = FORK.Process(target=claim, args=(folder, theirs, seconds))
    process.start()
    return process, answer.recv()


@pytest.mark.filterwarnings("ignore:This process.*fork:DeprecationWarning")
def test_one_process_at_a_time_claims_a_folder(tmp_path):
    folder = tmp_path / "new" / "run"
    with claimed(folder) as mine:
        assert mine
        with claimed(folder) as again:
            assert not again
        process, theirs = claiming(folder)
        process.join()
        assert not theirs
    process, theirs = claiming(folder)
    process.join()
    assert theirs


@pytest.mark.filterwarnings("ignore:This process.*fork:DeprecationWarning")
def test_a_killed_process_holds_nothing_and_others_wait_for_it(tmp_path):
    holder, theirs = claiming(tmp_path, seconds=60)
    with claimed(tmp_path) as mine:
        assert theirs and not mine
    holder.kill()
    with claimed(tmp_path, wait=True) as mine:
        assert mine
    holder.join()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_files_have_the_mode_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "a.json", 1)
        write_tensors(tmp_path / "a.safetensors", {"w": torch.ones(3)})
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o640}


def read_as_nobody(path: Path, answer: Connection) -> None:
    if os.geteuid() == 0:
        os.setuid(65534)
    try:
        read_json(path)
    except Exception as error:
        answer.send(repr(error))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
@pytest.mark.filterwarnings("ignore:This process.*fork:DeprecationWarning")
def test_a_file_that_may_not_be_read_is_not_said_to_be_absent(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, 1)
    path.chmod(0)
    answer, theirs = FORK.Pipe()
    process = FORK.Process(target=read_as_nobody, args=(path, theirs))
    process.start()
    assert answer.recv() == f"PermissionError('{path} cannot be read: permission denied')"
    process.join()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes in folders")
def test_a_pipe_is_refused_where_a_file_should_be(tmp_path):
    for name, read in {"a.json": read_json, "a.safetensors": read_tensors}.items():
        os.mkfifo(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name} is not a regular file"):
            read(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": 2, "a": 3}', "it has 'a' twice"),
        ("[NaN]", "it has the number 'NaN'"),
        ("[1e400]", "it has the number '1e400'"),
        ("9" * 900_000, "it has an integer of 900000 digits"),
        (str(2**64), "it has an integer of 20 digits"),
        ("[" * 100_000, "it nests more than 32 levels deep"),
        ("[" * 33 + "]" * 33, "it nests more than 32 levels deep"),
        (" " * (1 << 20) + "1", "it exceeds 1048576 bytes"),
        ("\ud800", "codec can't decode"),
    ],
    ids=lambda value: value[:20],
)
def test_json_that_is_no_config_is_refused(text, message, tmp_path):
    (tmp_path / "a.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(ValueError, match=f"a.json is not a JSON file: .*{message}"):
        read_json(tmp_path / "a.json")


def entry(shape, start, stop, dtype: object = "F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": {"shape": [4], "data_offsets": [0, 16]}}, "header cannot be read: 'a' is {"),
        ({"a": entry(["4"], 0, 16)}, "header cannot be read: 'a' is {"),
        ({"a": entry([4.0], 0, 16)}, "header cannot be read: 'a' is {"),
        ({"a": entry(None, 0, 16)}, "header cannot be read: 'a' is {"),
        ({"a": entry([4], 0, 16, ["F32"])}, "header cannot be read: 'a' is {"),
        ({"a": entry([4], 0, 16, "y" * 5000)}, "header cannot be read: 'a' is {"),
        ({"a": entry([True, 4], 0, 16)}, "header cannot be read: 'a' is {"),
        ({"a": entry([-4], 0, -16)}, "header cannot be read: 'a' is {"),
        ({"a": entry([1] * 9 + [4], 0, 16)}, "header cannot be read: 'a' is {"),
        ({"a": entry([0, 2**47, 2**47], 0, 0), "b": entry([4], 0, 16)}, "cannot be read: 'a' is {"),
        ({"a": entry([2**40], 0, 2**42)}, "4398046511[0-9]+ bytes expected from its header"),
        ({"a": entry([4], 0, 16), "b": entry([2], 8, 16)}, "'b' begins at byte"),
        ({"a": entry([2], 8, 16)}, "'a' begins at byte"),
        ([], "it is not an object"),
        ("[" * 200_000, "nests more than 32 levels deep"),
        (" " * (1 << 20), "safetensors header has 1048578 bytes"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_headers_that_do_not_describe_their_file_are_refused(header, message, tmp_path):
    text = header + "{}" if isinstance(header, str) else json.dumps(header)
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + bytes(16))
    for read in (read_tensors, map_safetensors):
        with pytest.raises(ValueError, match=f"a.safetensors.*{message}"):
            read(path)


def test_a_checksum_tells_values_types_and_names_apart():
    tensors = {"w": torch.ones(2, 3), "b": torch.zeros((), dtype=torch.bfloat16)}
    settings = sealed({"k": 16, "rate": 0.1}, tensors)
    assert is_sealed(dict(reversed(settings.items())), dict(reversed(tensors.items())))
    for one, other in [
        ({**settings, "k": 17}, tensors),
        ({"version": "0.1.0"}, tensors),
        (settings, {**tensors, "w": torch.ones(3, 2)}),
        (settings, {**tensors, "b": torch.zeros((), dtype=torch.float16)}),
        (settings, {"v": tensors["w"], "b": tensors["b"]}),
    ]:
        assert not is_sealed(one, other)
    assert is_sealed({"k": 17}, tensors), "older versions wrote none"
