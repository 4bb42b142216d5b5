import pytest
import torch

from fastsae.files import read_json, read_tensors, write_atomically, write_json, write_tensors


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
    with pytest.raises(ValueError, match=r"a.safetensors is not a whole safetensors file"):
        read_tensors(path)
