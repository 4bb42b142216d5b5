"""Evaluation of an SAE by the processes of a mesh, which divide its latents or the tokens."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from fastsae import SAE, AbsTopK, ActivationShards, BatchTopK, Gated, Rational, TopK
from fastsae.cli import eval as cli
from fastsae.distributed import Mesh
from fastsae.evals import EvalConfig, evaluate
from fastsae.files import read_json
from fastsae.interop import load_divided
from fastsae.nn import Activation, init_from_data
from fastsae.shards import Shards
from tests.distributed.processes import as_started
from tests.evals.conftest import gpt2 as gpt2
from tests.evals.conftest import gpt2_data as gpt2_data

CASES: dict[str, tuple[tuple[int, int], Activation]] = {
    "topk": ((1, 4), TopK(4, corrections=2)),
    "batchtopk": ((2, 2), BatchTopK(4)),
    "gated": ((1, 2), Gated()),
    "rational": ((4, 1), Rational()),
    "abstopk": ((3, 1), AbsTopK(4)),
}


def numbers(shards: Shards, folder: Path, data: Path) -> dict[str, Any]:
    sae = load_divided(folder, shards)
    assert len(sae.W_enc) == sae.d_sae // shards.latent
    settings = EvalConfig(windows=5, batch_windows=2, batch_size=100)
    found = evaluate(sae, ActivationShards(data), settings, progress=False)
    assert found.downstream is not None
    retained = found.reconstruction.pc_retention
    return asdict(found.reconstruction) | asdict(found.downstream) | {"pc_retention": 0} | retained


@pytest.mark.parametrize("name", CASES)
def test_a_mesh_finds_the_numbers_of_one_process(processes, gpt2_data, tmp_path, name):
    """Also in float32 if tokens alone are divided: batches are then the same. Else in float64, so
    that what differs by more than rounding shows."""
    torch.manual_seed(0)
    axes, activation = CASES[name]
    sae = init_from_data(SAE(16, 48, activation), gpt2_data.sample(500))
    sae = sae if axes[1] == 1 else sae.double()
    if isinstance(activation, BatchTopK):
        activation.threshold.fill_(0.5)
    with torch.no_grad():
        sae.b_enc.normal_(std=0.1)
    sae.save(tmp_path)
    (expected,) = processes.run((1, 1), numbers, tmp_path, gpt2_data.path)
    for found in processes.run(axes, numbers, tmp_path, gpt2_data.path):
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_the_command_divides_tokens_by_default_and_latents_if_asked(processes, gpt2_data, tmp_path):
    SAE(16, 48, TopK(4)).save(tmp_path)
    words = "eval", tmp_path, "--data", gpt2_data.path, "--windows", "2"
    found = []
    for mesh in ((), ("--mesh", "data=1,latent=2")):
        texts = as_started(processes, 2, *words, *mesh)
        assert "FVU" in texts[0] and not texts[1]
        found.append(read_json(tmp_path / "eval.json"))
    assert found[0]["reconstruction"]["fvu"] == pytest.approx(found[1]["reconstruction"]["fvu"])


def axes_of(mesh: Mesh, folder: Path, left: int) -> tuple[int, int]:
    """How two machines of two processes with so much memory evaluate an SAE."""
    torchrun = {"RANK": str(mesh.rank), "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    with patch.dict(os.environ, torchrun), patch.object(cli, "memory_left", lambda *_: left):
        found = cli.divided_if_large(folder, "cpu", mesh)
    return found.data, found.latent


def test_latents_are_divided_if_the_sae_takes_more_than_half_of_the_memory(processes, tmp_path):
    SAE(16, 48, TopK(4)).save(tmp_path)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    for left, axes in ((2 * size, (4, 1)), (2 * size - 1, (2, 2))):
        assert processes.run((4, 1), axes_of, tmp_path, left) == [axes] * 4


def unreadable(shards: Shards, folder: Path, data: Path) -> str:
    with pytest.raises(ValueError) as refusal:
        numbers(shards, folder, data)
    return str(refusal.value)


def test_a_nan_that_one_process_reads_ends_all_by_its_name(processes, tmp_path):
    x = np.random.default_rng(0).standard_normal((20_000, 16), dtype=np.float32)
    x[150] = np.nan  # not in the sample of which all know
    np.save(tmp_path / "x.npy", x)
    SAE(16, 48, TopK(4)).save(tmp_path)
    first, second = processes.run((2, 1), unreadable, tmp_path, tmp_path / "x.npy")
    assert second == "data holds NaN or Inf: x.npy row 150" and first == f"process 1: {second}"


def damaged(shards: Shards, folder: Path) -> str:
    with pytest.raises(ValueError) as refusal:
        load_divided(folder, shards)
    return str(refusal.value)


def test_a_damaged_sae_is_refused_by_all(processes, tmp_path):
    SAE(16, 48, TopK(4)).save(tmp_path)
    path = tmp_path / "sae.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1  # in the rows of the last process
    path.write_bytes(content)
    for text in processes.run((1, 2), damaged, tmp_path):
        assert "was changed after it was saved" in text
