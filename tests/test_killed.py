"""Processes killed at any moment while they replace files: the old or the new, never a mix."""

import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

import fastsae
from fastsae import SAE, TopK, interop
from fastsae.checkpoint import list_checkpoints, load_checkpoint, newest_intact, save_checkpoint
from fastsae.cli.convert import main as convert
from fastsae.sharded import save_sharded
from fastsae.shards import Shards

from .processes import run_all

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process"),
    pytest.mark.filterwarnings("ignore:This process.*fork:DeprecationWarning"),
]
FORK = get_context("fork")


def killed_at(event: int, act: Callable[[], object]) -> bool:
    """Run it in a process that dies before its file operation of that number; False if it has
    fewer."""

    def watched() -> None:
        left = [event]

        def hook(name: str, arguments: tuple) -> None:
            if name in ("os.rename", "os.remove"):
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)

        sys.addaudithook(hook)
        act()

    process = FORK.Process(target=watched)
    process.start()
    process.join()
    return process.exitcode == 9


def without_checksum(folder: Path) -> None:
    """As older versions wrote it."""
    path = folder / "config.json"
    values = json.loads(path.read_text())
    del values["crc32"], values["version"]
    path.write_text(json.dumps(values))


def found(folder: Path, saes: dict[str, SAE]) -> str:
    """Which of these SAEs a folder holds, as a whole."""
    try:
        sae = fastsae.load(folder)
    except ValueError:
        return "refused"
    weights = [name for name, one in saes.items() if torch.equal(sae.W_dec, one.W_dec)]
    settings = [name for name, one in saes.items() if sae.activation.cfg == one.activation.cfg]
    assert weights == settings, "a mix of two"
    return weights[0]


def save_by_two(sae: SAE, folder: Path) -> None:
    """As `SAE.save`, by two processes."""
    names = ["W_enc", "b_enc", "W_dec"]

    def save_part(shards: Shards) -> None:
        rows, tensors = shards.rows(sae.d_sae), sae.state_dict()
        tensors |= {name: tensors[name][rows] for name in names}
        save_sharded(tensors, sae.config(), folder, names, shards)

    run_all(1, 2, save_part)


@pytest.mark.parametrize("save_new", [SAE.save, save_by_two])
@pytest.mark.parametrize("older", [False, True])
def test_an_sae_is_replaced_as_a_whole(older, save_new, tmp_path):
    saes, states = {"old": SAE(6, 10, TopK(3)), "new": SAE(6, 10, TopK(5))}, []
    for event in itertools.count():
        saes["old"].save(tmp_path)
        if older:
            without_checksum(tmp_path)
        killed = killed_at(event, lambda: save_new(saes["new"], tmp_path))
        states.append(found(tmp_path, saes))
        if not killed:
            break
    assert states == sorted(states, reverse=True) and {*states} == {"old", "new"}


def test_an_sae_whose_tensors_are_not_renamed_yet_outlives_a_second_kill(tmp_path):
    saes = {name: SAE(6, 10, TopK(k)) for name, k in (("old", 3), ("new", 4), ("newest", 5))}
    states = []
    for event in itertools.count():
        saes["old"].save(tmp_path)
        assert killed_at(3, lambda: saes["new"].save(tmp_path))
        assert found(tmp_path, saes) == "new" and (tmp_path / ".sae.safetensors.tmp").exists()
        killed = killed_at(event, lambda: saes["newest"].save(tmp_path))
        states.append(found(tmp_path, saes))
        if not killed:
            break
    assert states == sorted(states) and {*states} == {"new", "newest"}


def test_no_mix_of_two_in_the_format_of_another_library(tmp_path):
    saes, states = {"old": SAE(6, 10, TopK(3)), "new": SAE(6, 10, TopK(5))}, []
    for event in itertools.count():
        interop.save(saes["old"], tmp_path, "sparsify")
        killed = killed_at(event, lambda: interop.save(saes["new"], tmp_path, "sparsify"))
        states.append(found(tmp_path, saes))
        if not killed:
            break
    assert states[0] == "old" and states[-1] == "new" and "refused" in states


def test_a_conversion_that_was_killed_can_be_repeated(tmp_path):
    source, files = str(tmp_path / "source"), set()
    SAE(6, 10, TopK(3)).save(source)
    for event in itertools.count():
        out = tmp_path / str(event)
        killed = killed_at(event, lambda out=out: convert([source, str(out), "--to", "sae_lens"]))
        if killed:
            with suppress(ValueError):  # it was complete
                convert([source, str(out), "--to", "sparsify"])
        fastsae.load(out)
        files.add(frozenset(path.name for path in out.iterdir() if path.name[0] != "."))
        if not killed:
            break
    one, two = {"cfg.json", "sae.safetensors"}, {"cfg.json", "sae_weights.safetensors"}
    assert files == {frozenset(one), frozenset(two)}


def test_several_conversions_to_one_directory_do_not_mix(tmp_path):
    saes = {str(k): SAE(6, 10, TopK(k)) for k in (2, 3, 4)}
    for name, sae in saes.items():
        sae.save(tmp_path / name)
    out = str(tmp_path / "out")

    def one(name: str) -> None:
        try:
            convert([str(tmp_path / name), out, "--to", "dictionary_learning"])
        except ValueError as error:
            assert "not an empty directory" in str(error) or "another process" in str(error)
            sys.exit(1)

    processes = [FORK.Process(target=one, args=(name,)) for name in saes]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    (won,) = [name for name, p in zip(saes, processes, strict=True) if p.exitcode == 0]
    assert found(tmp_path / "out", saes) == won


def save(run: Path, step: int, value: float) -> None:
    save_checkpoint(run, step, {"x": torch.full((2,), value)}, {"value": value}, keep=1)


def save_halves(run: Path, step: int, value: float) -> None:
    """By two processes."""
    half, meta = {"x": torch.tensor([value])}, {"value": value}
    run_all(1, 2, lambda shards: save_checkpoint(run, step, half, meta, 1, ["x"], shards))


def newest(run: Path) -> float:
    tensors, meta = load_checkpoint(list_checkpoints(run)[-1])
    assert tensors["x"].tolist() == [meta["value"]] * 2
    return meta["value"]


@pytest.mark.parametrize("save_new", [save, save_halves])
@pytest.mark.parametrize("step", [1, 2])
def test_a_checkpoint_is_listed_whenever_saving_another_is_killed(step, save_new, tmp_path):
    """Also if it is of the same step, and but one is kept."""
    states = []
    for event in itertools.count():
        run = tmp_path / str(event)
        save(run, 1, 1.0)
        killed = killed_at(event, lambda run=run: save_new(run, step, 2.0))
        states.append(newest(run))
        save(run, step, 3.0)
        assert newest(run) == 3.0 and len([*run.iterdir()]) == 1, "nothing is left of the killed"
        if not killed:
            break
    assert states == sorted(states) and {*states} == {1.0, 2.0}


@pytest.mark.parametrize("step", [1, 2])
def test_a_checkpoint_outlives_a_second_kill(step, tmp_path):
    """Whatever the first one left behind, of the same step or of a step before it."""
    seen = []
    for first in itertools.count():
        halfway = tmp_path / f"{first}"
        save(halfway, 1, 1.0)
        killed, states = killed_at(first, lambda run=halfway: save(run, 1, 2.0)), []
        before, left = newest(halfway), {path.name for path in halfway.iterdir()}
        if killed and left in seen:
            continue
        seen.append(left)
        for event in itertools.count():
            run = tmp_path / f"{first}-{event}"
            shutil.copytree(halfway, run)
            again = killed_at(event, lambda run=run: save(run, step, 3.0))
            states.append(newest(run))
            if not again:
                assert [path.name for path in run.iterdir()] == [f"step-{step:08d}"]
                break
        assert states == sorted(states) and {*states} == {before, 3.0}
        if not killed:
            break


def test_a_sweep_has_a_checkpoint_of_every_sae_whenever_saving_them_is_killed(tmp_path):
    names = set()
    for event in itertools.count():
        runs = [tmp_path / str(event) / name for name in "ab"]
        for run in runs:
            save(run, 1, 1.0)
        killed = killed_at(event, lambda runs=runs: [save(run, 1, 2.0) for run in runs])
        found = newest_intact(dict.fromkeys(runs, ()))
        assert found is not None and all(meta["step"] == 1 for _, meta in found)
        names |= {tuple(path.name for run in runs for path in list_checkpoints(run))}
        if not killed:
            break
    one, other = "step-00000001", "step-00000001.old"
    assert names == {(one, one), (other, one), (one, other)}
