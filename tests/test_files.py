import os
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest
import torch

from fastsae.files import (
    claimed,
    read_json,
    read_tensors,
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
