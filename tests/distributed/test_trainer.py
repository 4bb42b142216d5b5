"""Whole runs on meshes: the folder that they leave, and how they stop and go on."""

from pathlib import Path
from typing import Any

import pytest
import torch

import fastsae
from fastsae.files import read_json
from fastsae.shards import ONE_PROCESS, Shards
from fastsae.train import TrainConfig, Trainer
from fastsae.train.log import read_lines
from tests.train.conftest import activations as activations
from tests.train.conftest import train_config

SETTINGS: dict[str, Any] = {
    "d_sae": 48, "k": 4, "steps": 12, "batch_size": 64, "checkpoint_every": 4, "log_every": 4,
    "dead_after": 128, "eval_every": 4,
}  # fmt: skip


def config(data: Path, out: Path, **settings: Any) -> TrainConfig:
    return train_config(data=str(data), out=str(out), **SETTINGS | settings)


def fit(shards: Shards, config: TrainConfig, resume: bool = False) -> None:
    source = fastsae.ActivationShards(config.data)
    source.heldout = fastsae.ActivationShards(config.data)
    Trainer(config, source, progress=False, shards=shards).fit(resume)


def results(out: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """The saved SAE's weights, and the lines of metrics without times."""
    times = "seconds", "tokens_per_second"
    lines = read_lines(out / "metrics.jsonl")
    return fastsae.load(out / "sae").state_dict(), [
        {name: value for name, value in line.items() if name not in times} for line in lines
    ]


@pytest.mark.parametrize("axes", [(1, 2), (2, 2), (1, 4)], ids=str)
def test_a_run_of_a_mesh_is_that_of_one_process(processes, activations, tmp_path, axes):
    one, many = tmp_path / "one", tmp_path / "many"
    fit(ONE_PROCESS, config(activations, one))
    processes.run(axes, fit, config(activations, many))
    (weights, lines), (found, found_lines) = results(one), results(many)
    assert any(line["dead_fraction"] for line in lines), "the aux loss takes part"
    for name, weight in weights.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5, msg=name)
    for line, other in zip(lines, found_lines, strict=True):
        assert other == pytest.approx(line, rel=1e-4)
    summaries = [read_json(out / "summary.json") for out in (one, many)]
    assert summaries[1]["fvu"] == pytest.approx(summaries[0]["fvu"], rel=1e-4)
    assert {path.name for path in many.iterdir()} >= {"config.json", "summary.json", "checkpoints"}
