"""Checkpoints and SAEs that several processes write, each a part: threads play the processes."""

import itertools
import os
import sys
import zlib
from pathlib import Path
from threading import current_thread

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import fastsae
from fastsae import SAE, Gated, JumpReLU, TopK, sharded
from fastsae.checkpoint import list_checkpoints, load_checkpoint, newest_intact, save_checkpoint
from fastsae.files import checksum, create, joined_crc32, layout_of, write_rows
from fastsae.sharded import save_sharded
from fastsae.shards import ONE_PROCESS, Shards

from .fuzz import resident
from .processes import run, run_all

D_SAE = 12
SHARDED = "sae.W_enc", "adam.second", "fired", "dead", "low", "absent"
META = {"tokens": 7, "scales": [0.1, 2.0], "cursor": {"place": [1, 2]}}
MESHES: list[tuple[int, int]] = [(1, 1), (1, 2), (1, 3), (1, 4), (2, 2), (3, 1), (2, 6)]
FILES = sharded.file_names(4)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """As if tensors had many pieces."""
    monkeypatch.setattr(checksum, "PIECE", 50)


def state(seed: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {
        "sae.W_enc": torch.randn(5, D_SAE, generator=random).T,
        "sae.b_dec": torch.randn(5, generator=random),
        "adam.second": torch.rand(D_SAE, 1, generator=random),
        "fired": torch.randint(99, (D_SAE,), generator=random),
        "dead": torch.rand(D_SAE, generator=random) < 0.5,
        "low": torch.randn(D_SAE, 2, 3, generator=random).bfloat16(),
        "left_out": torch.tensor(seed),
        "rng": torch.randint(256, (3,), generator=random).byte(),
    }


def own(tensors: dict[str, Tensor], names, shards: Shards) -> dict[str, Tensor]:
    """What a process has of whole tensors."""
    rows = shards.rows(D_SAE)
    return {name: tensor[rows] if name in names else tensor for name, tensor in tensors.items()}


def save(folder: Path, step: int, shards: Shards = ONE_PROCESS) -> Path:
    tensors = own(state(step), SHARDED, shards)
    return save_checkpoint(folder, step, tensors, META, 2, SHARDED, shards)


def assert_loaded(found, step: int, shards: Shards = ONE_PROCESS) -> None:
    (tensors, meta), wanted = found, own(state(step), SHARDED, shards)
    assert tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor)
    assert meta["step"] == step and META.items() <= meta.items()


@pytest.mark.parametrize("writers", MESHES)
def test_any_mesh_resumes_any_other(writers: tuple[int, int], tmp_path):
    run_all(*writers, lambda shards: save(tmp_path, 5, shards))
    path = tmp_path / "step-00000005"
    assert_loaded(load_checkpoint(path), 5)
    for readers in MESHES:
        run_all(
            *readers,
            lambda shards: assert_loaded(load_checkpoint(path, SHARDED, shards), 5, shards),
        )
    errors = run(1, 5, lambda shards: load_checkpoint(path, SHARDED, shards))
    assert all("not divisible by 5" in str(error) for error in errors)


def test_a_checkpoint_of_many_latents_is_resumed(tmp_path, monkeypatch):
    """Bytes and numbers of rows are counts, not the sizes of one tensor."""
    monkeypatch.setattr(checksum, "PIECE", 1 << 20)
    whole = torch.arange(1 << 17, dtype=torch.float32)

    def save_half(shards: Shards) -> Path:
        half = {"x": whole[shards.rows(len(whole))]}
        return save_checkpoint(tmp_path, 1, half, {}, 1, ["x"], shards)

    path, _ = run_all(1, 2, save_half)
    assert torch.equal(load_checkpoint(path)[0]["x"], whole)


def test_one_process_writes_what_it_always_wrote(tmp_path):
    save(tmp_path, 5)
    save_checkpoint(tmp_path, 6, state(5), META, 2)
    one, other = (tmp_path / f"step-0000000{step}" for step in (5, 6))
    assert sorted(os.listdir(one)) == ["state.json", "state.safetensors"]
    assert (one / FILES[0]).read_bytes() == (other / FILES[0]).read_bytes()


SAES = {
    "topk": lambda: SAE(6, D_SAE, TopK(3)),
    "jumprelu": lambda: SAE(6, D_SAE, JumpReLU(), layers=2),
    "gated": lambda: SAE(6, D_SAE, Gated(), d_out=4, skip=True).bfloat16(),
}


@pytest.mark.parametrize("mesh", [(1, 1), (1, 4), (2, 3)])
@pytest.mark.parametrize("name", SAES)
def test_an_sae_is_saved_byte_for_byte_as_by_one_process(name, mesh: tuple[int, int], tmp_path):
    sae = SAES[name]()
    sae.save(tmp_path / "one")
    tensors = sae.state_dict()
    names = [name for name, tensor in tensors.items() if tensor.shape[:1] == (D_SAE,)]
    many = tmp_path / "many"
    run_all(*mesh, lambda s: save_sharded(own(tensors, names, s), sae.config(), many, names, s))
    assert sorted(os.listdir(many)) == ["config.json", "sae.safetensors"]
    for file in os.listdir(many):
        assert (many / file).read_bytes() == (tmp_path / "one" / file).read_bytes()


def test_headers_are_those_of_the_library(tmp_path):
    dtypes = torch.float64, torch.bool, torch.bfloat16, torch.int8, torch.float32, torch.int64
    names = "z", 'a"b', "é\n", "dot.ted", "A", "0"
    shapes = (3, 2), (), (0, 4), (7,), (5, 1, 1), (1,)
    for order in itertools.islice(itertools.permutations(range(6)), 0, 720, 37):
        tensors = {
            names[n]: torch.ones(shapes[n], dtype=dtypes[place]) for place, n in enumerate(order)
        }
        theirs, ours = tmp_path / "theirs", tmp_path / "ours"
        save_file(tensors, theirs)
        layout = layout_of(tensors, {})
        ours.unlink(missing_ok=True)
        create(ours, layout)
        found = write_rows(ours, layout, tensors, 0)
        assert ours.read_bytes() == theirs.read_bytes()
        assert layout.crc32(found) == zlib.crc32(theirs.read_bytes())


@pytest.mark.parametrize("sizes", [(0, 0), (5, 0), (0, 5), (1, 255), (3, 4096), (99, 12345)])
def test_checksums_of_parts_join_to_that_of_the_whole(sizes):
    one, other = map(os.urandom, sizes)
    joined = joined_crc32(zlib.crc32(one), zlib.crc32(other), len(other))
    assert joined == zlib.crc32(one + other)


class Killed(BaseException):
    """What no process tells the others of."""


FAILURES = OSError("no space left on device"), KeyError("a fault"), Killed()


@pytest.mark.parametrize("failure", FAILURES, ids=repr)
@pytest.mark.parametrize("rank", range(4))
def test_a_failure_while_writing_reaches_all_and_leaves_what_was_saved(
    rank, failure, tmp_path, monkeypatch
):
    runs, folder, names = tmp_path / "runs", tmp_path / "sae", ["W_enc", "b_enc", "W_dec"]
    old, new = SAE(6, D_SAE, TopK(3)), SAE(6, D_SAE, TopK(4))

    def save_sae(sae: SAE, shards: Shards) -> None:
        save_sharded(own(sae.state_dict(), names, shards), sae.config(), folder, names, shards)

    def failing(path, layout, tensors, first):
        if current_thread().name != str(rank):
            return write_rows(path, layout, tensors, first)
        write_rows(path, layout, dict(itertools.islice(tensors.items(), 1)), first)
        raise failure

    old.save(folder)
    run_all(1, 4, lambda shards: save(runs, 5, shards))
    with monkeypatch.context() as patch:
        patch.setattr(sharded, "write_rows", failing)
        for act in (lambda shards: save(runs, 6, shards), lambda shards: save_sae(new, shards)):
            errors = run(1, 4, act)
            assert errors[rank] is failure
            if isinstance(failure, Killed):
                assert all(isinstance(error, BaseException) for error in errors)
            else:
                assert all(str(failure) in str(error) for error in errors)
                assert [path.name for path in runs.iterdir()] == ["step-00000005"]
    assert_loaded(load_checkpoint(list_checkpoints(runs)[-1]), 5)
    assert sorted(os.listdir(folder)) == ["config.json", "sae.safetensors"]
    assert torch.equal(fastsae.load(folder).W_dec, old.W_dec)
    run_all(1, 4, lambda shards: save(runs, 6, shards))
    run_all(1, 4, lambda shards: save_sae(new, shards))
    assert_loaded(load_checkpoint(list_checkpoints(runs)[-1]), 6)
    assert torch.equal(fastsae.load(folder).W_dec, new.W_dec)
    assert all(path.name[0] != "." for path in runs.iterdir())


def test_processes_that_should_hold_the_same_are_compared(tmp_path):
    def act(shards: Shards) -> None:
        tensors = own(state(), SHARDED, shards)
        if shards.rank == 3:
            tensors["low"] = tensors["low"] + 1
        save_checkpoint(tmp_path, 5, tensors, META, 2, SHARDED, shards)

    for error in run(2, 2, act):
        assert isinstance(error, ValueError) and "processes [3] and [1]" in str(error)
        assert "['low']" in str(error)
    assert not [*tmp_path.iterdir()]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 9)


@pytest.mark.parametrize(
    ("file", "harm"),
    [
        *((file, flip) for file in (*FILES, "state.json")),
        *((file, harm) for file in (*FILES[:2], "state.json") for harm in (truncate, Path.unlink)),
    ],
)
def test_all_processes_pass_over_a_damaged_checkpoint(file, harm, tmp_path):
    for step in (5, 6):
        run_all(1, 4, lambda shards, step=step: save(tmp_path, step, shards))
    harm(tmp_path / "step-00000006" / file)

    def resume(shards: Shards) -> None:
        (found,) = newest_intact({tmp_path: SHARDED}, shards) or []
        assert_loaded(found, 5, shards)

    for mesh in ((1, 1), (2, 2), (1, 3)):
        run_all(*mesh, resume)
    harm(tmp_path / "step-00000005" / file)
    for error in run(2, 2, resume):
        assert isinstance(error, ValueError) and "no checkpoint is intact: " in str(error)


def test_one_flipped_bit_of_a_checkpoint_by_one_process_is_seen_by_all(tmp_path):
    for step in (5, 6):
        save(tmp_path, step)
    flip(tmp_path / "step-00000006" / FILES[0])
    for found in run_all(2, 2, lambda shards: newest_intact({tmp_path: SHARDED}, shards)):
        assert found[0][1]["step"] == 5


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_writers_copy_a_piece_at_a_time(tmp_path, monkeypatch):
    """Of rows that are not contiguous, so that what is written is a copy."""
    monkeypatch.setattr(checksum, "PIECE", 1 << 20)
    rows, width = 1 << 14, 1 << 10  # 64 MiB on each of two processes
    parts = [{"W_dec": torch.ones(width, rows).T} for _ in range(2)]
    for act in (
        lambda shards: save_sharded(parts[shards.rank], {}, tmp_path, ["W_dec"], shards),
        lambda shards: save_checkpoint(tmp_path, 1, parts[shards.rank], {}, 1, ["W_dec"], shards),
    ):
        Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
        before = resident("VmRSS")
        run_all(1, 2, act)
        assert resident("VmHWM") - before < 32
