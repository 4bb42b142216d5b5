"""Evaluation of an SAE whose latents the processes of a mesh divide."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsae import SAE, ActivationShards, BatchTopK, Gated, TopK
from fastsae.evals import EvalConfig, evaluate
from fastsae.interop import load_divided
from fastsae.nn import Activation, init_from_data
from fastsae.shards import ONE_PROCESS, Shards
from tests.evals.conftest import gpt2 as gpt2
from tests.evals.conftest import gpt2_data as gpt2_data

ACTIVATIONS = {"topk": TopK(4, corrections=2), "batchtopk": BatchTopK(4), "gated": Gated()}


def numbers(shards: Shards, folder: Path, data: Path) -> dict[str, Any]:
    sae = load_divided(folder, shards)
    assert len(sae.W_enc) == sae.d_sae // shards.latent
    found = evaluate(sae, ActivationShards(data), EvalConfig(windows=4), progress=False)
    assert found.downstream is not None
    retained = found.reconstruction.pc_retention
    return asdict(found.reconstruction) | asdict(found.downstream) | {"pc_retention": 0} | retained


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=[*ACTIVATIONS])
def test_a_divided_sae_has_the_metrics_of_the_whole(
    processes, gpt2_data, tmp_path, activation: Activation
):
    torch.manual_seed(0)
    sae = init_from_data(SAE(16, 48, activation), gpt2_data.sample(500))
    if isinstance(activation, BatchTopK):
        activation.threshold.fill_(0.5)
    with torch.no_grad():
        sae.b_enc.normal_(std=0.1)
    sae.save(tmp_path)
    expected = numbers(ONE_PROCESS, tmp_path, gpt2_data.path)
    for found in processes.run((1, 4), numbers, tmp_path, gpt2_data.path):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)


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
