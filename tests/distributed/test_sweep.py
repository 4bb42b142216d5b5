"""Sweeps whose SAEs are each trained by a group of processes."""

import os
import signal
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from fastsae.distributed import Mesh
from fastsae.distributed.launch import Place, axes_of
from fastsae.files import read_json
from fastsae.shards import ONE_PROCESS, Shards
from fastsae.train import Interrupted, Sweep, TrainConfig, Trainer
from fastsae.train.sweep import check_groups
from tests.distributed.processes import as_started
from tests.distributed.rounding import assert_rounding, assert_same_run, columns, default_dtype
from tests.distributed.test_trainer import config, source_of
from tests.train.conftest import activations as activations

SAES: dict[str, dict[str, Any]] = {
    "k2": {"k": 2},
    "batch": {"k": 3, "activation": "batchtopk"},
    "k4": {"k": 4, "seed": 1},
    "abs": {"k": 40, "activation": "abstopk"},
}
"""Of two groups, one trains two that share an encoder GEMM; 40 of 48 latents are active in one."""


def configs(activations: Path) -> dict[str, TrainConfig]:
    return {
        name: config(activations, Path("set by the sweep"), **own) for name, own in SAES.items()
    }


def sweep(
    shards: Shards,
    axes: tuple[int, int],
    data: Path,
    out: Path,
    resume: bool = False,
    dtype: torch.dtype = torch.float64,
) -> list[str]:
    """Train the SAEs, each on a mesh of these axes; the names of those that this process trains."""
    with default_dtype(dtype):
        group, every = shards.part(*axes), configs(data)
        source = source_of(every["k2"])
        found = Sweep(every, source, out, progress=False, shards=shards, group=group)
        return [*found.fit(resume)]


def assert_same(*sweeps: Path) -> None:
    """Of a mesh, of one process, and of one in float32."""
    for name in SAES:
        assert_same_run(*(out / name for out in sweeps))
    found = [read_json(out / "comparison.json") for out in sweeps]
    assert all([*summaries] == [*SAES] for summaries in found)
    fvus = ({name: run["fvu"] for name, run in summaries.items()} for summaries in found)
    assert_rounding(*(columns([fvu]) for fvu in fvus))


@pytest.fixture(scope="module")
def alone(activations, tmp_path_factory) -> tuple[Path, Path]:
    """The sweep of one process in float64 and in float32."""
    exact, rough = (tmp_path_factory.mktemp("sweep") / name for name in ("exact", "rough"))
    assert sweep(ONE_PROCESS, (1, 1), activations, exact) == [*SAES]
    sweep(ONE_PROCESS, (1, 1), activations, rough, dtype=torch.float32)
    return exact, rough


@pytest.mark.parametrize("axes", [(1, 2), (2, 1), (1, 1)], ids=str)
def test_groups_train_what_one_process_trains(processes, alone, activations, tmp_path, axes):
    size = axes[0] * axes[1]
    trained = processes.run((4, 1), sweep, axes, activations, tmp_path / "many")
    assert trained == [[*SAES][rank // size :: 4 // size] for rank in range(4)]
    assert_same(tmp_path / "many", *alone)


def stop_a_group(mesh: Mesh, data: Path, out: Path) -> str:
    """How a sweep ends in which SIGTERM comes to the last process, before its sixth step, and to
    the first one, after its last step. The others do not get it."""
    take, finish = Trainer.take, Trainer.finish

    def signalled(self: Trainer, batches: Any, step: int, interrupts: Any) -> Any:
        if step == 5 and mesh.rank == mesh.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(self, batches, step, interrupts)

    def signalled_later(self: Trainer, state: Any) -> Any:
        if mesh.rank == 0 and self.config.out.name == "k2":  # once: a second signal kills
            os.kill(os.getpid(), signal.SIGTERM)
        return finish(self, state)

    with patch.multiple(Trainer, take=signalled, finish=signalled_later):
        try:
            sweep(mesh, (1, 2), data, out)
        except (Interrupted, RuntimeError) as end:
            return f"{type(end).__name__}: {end}"
    raise AssertionError("the sweep was to stop")


@pytest.mark.parametrize("axes", [(1, 1), (2, 1)], ids=str)
def test_a_group_stops_alone_and_others_resume_the_sweep(
    processes, alone, activations, tmp_path, axes
):
    """Those that the first group has finished wait for the others."""
    out = tmp_path / "many"
    first, second, *others = processes.run((1, 4), stop_a_group, activations, out)
    left = f"saved; continue with --resume --out {out}"
    assert others == [f"Interrupted: stopped at step 5 of 12, {left}"] * 2
    assert first == f"Interrupted: stopped before other processes had trained their SAEs, {left}"
    assert second.startswith("RuntimeError"), "without a signal, it notices at the end"
    processes.run(axes, sweep, axes, activations, out, True)
    assert_same(out, *alone)


def test_processes_that_cannot_share_the_saes_out_are_refused():
    for saes, processes, enough in ((2, 8, 4), (3, 8, 4), (1, 6, 6), (3, 6, 2)):
        with pytest.raises(ValueError, match=f"--mesh latent={enough} lets {enough} processes"):
            check_groups(saes, processes, 1)
    check_groups(2, 8, 4)
    with pytest.raises(ValueError, match="takes a multiple of 3 processes, but there are 4"):
        axes_of("latent=3", Place(0, 4, 0, 4), several=True)


def test_the_command_divides_each_sae(processes, activations, tmp_path):
    out = tmp_path / "sweep"
    options = ["--d-sae=48", "--batch-size=64", "--steps=4", "--mesh=latent=2"]
    options += [f"--data={activations}", f"--out={out}"]
    texts = as_started(processes, 4, "sweep", "topk:k=2", "topk:k=4", *options)
    assert "topk-k=2" in texts[0] and not any(texts[1:])
    names = {path.name for path in (out / "topk-k=4" / "checkpoints").glob("*/*")}
    assert "shard-00001-of-00002.safetensors" in names
