"""Training steps on meshes against the same steps in one process."""

import copy
from typing import Any

import pytest
import torch

from fastsae import SAE
from fastsae.distributed import parallelize, per_latent
from fastsae.shards import ONE_PROCESS, Shards
from fastsae.train.optim import Adam, Optimizer
from fastsae.train.step import autograd_step, fused_step
from tests.architectures import ARCHITECTURES, D_SAE, Architecture

STEPS, TOKENS = 12, 24
DEAD = 0, 3, 5, 17, 40  # of 4 shares of 16 latents, one has none and one three
FUSED = "topk", "abstopk", "batchtopk", "batchabstopk"


def start(architecture: Architecture, dtype: torch.dtype) -> SAE:
    torch.manual_seed(0)
    sae = architecture.build().to(dtype)
    with torch.no_grad():
        sae.b_enc.normal_(std=0.1)
        sae.b_dec.normal_()
    return sae


def train(
    shards: Shards, name: str, fused: bool, dtype: torch.dtype, clip: float | None = None
) -> dict[str, Any]:
    """Some steps, with dead latents from the third on: this process's rows, and the losses."""
    architecture = ARCHITECTURES[name]
    sae = start(architecture, dtype)
    rows = shards.rows(D_SAE)
    parallelize(sae, shards)
    adam = Adam(sae, Optimizer(clip=clip))
    objective = architecture.objective
    dead = torch.tensor([f - rows.start for f in DEAD if f in range(rows.start, rows.stop)]).long()
    data = torch.randn(STEPS, TOKENS, sae.d_in + (sae.d_out or 0), dtype=dtype)
    losses = []
    for step, x in enumerate(data):
        adam.begin_step(1e-2)
        some = dead if step > 1 else None
        if fused:
            result = fused_step(sae, adam, x, some, objective)
        else:
            x, y = (x, None) if sae.d_out is None else x.split([sae.d_in, sae.d_out], 1)
            progress = (step + 1) / STEPS
            result = autograd_step(sae, adam, x, some, objective, y, progress)
        losses.append(torch.stack(result[:5]))
    state = sae.state_dict()
    return {"rows": rows, "losses": torch.stack(losses), "state": copy.deepcopy(state)}


def whole(found: list[dict[str, Any]], name: str) -> dict[str, torch.Tensor]:
    """The state of all latents from those of the processes; what they share must be equal."""
    divided, state = per_latent(start(ARCHITECTURES[name], torch.float64)), {}
    for key, value in found[0]["state"].items():
        parts = {part["rows"].start: part["state"][key] for part in found}
        for part in found:
            same = parts[part["rows"].start] if key in divided else value
            assert torch.equal(part["state"][key], same), f"{key} differs between processes"
        rows = [parts[first] for first in sorted(parts)]
        state[key] = torch.cat(rows) if key in divided else value
    return state


@pytest.mark.parametrize("axes", [(1, 2), (1, 4), (2, 2)], ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_fused_steps_of_a_mesh_are_those_of_one_process(processes, name, axes):
    expected = train(ONE_PROCESS, name, True, torch.float64)
    found = processes.run(axes, train, name, True, torch.float64)
    for part in found:
        torch.testing.assert_close(part["losses"], expected["losses"], rtol=1e-12, atol=1e-12)
    for key, value in whole(found, name).items():
        torch.testing.assert_close(value, expected["state"][key], rtol=1e-9, atol=1e-12, msg=key)


SUPPORTED = [
    name
    for name, architecture in ARCHITECTURES.items()
    if architecture.activation.name in ("topk", "batchtopk", "jumprelu", "relu", "gated")
    and not architecture.activation.build().decodes
]


@pytest.mark.parametrize("name", SUPPORTED)
def test_differentiated_steps_of_a_mesh_are_those_of_one_process(processes, name):
    clip = 0.05 if len(name) % 3 == 0 else None
    expected = train(ONE_PROCESS, name, False, torch.float64, clip)
    axes = (1, 2) if len(name) % 2 else (1, 4)
    found = processes.run(axes, train, name, False, torch.float64, clip)
    for part in found:
        torch.testing.assert_close(part["losses"], expected["losses"], rtol=1e-9, atol=1e-12)
    for key, value in whole(found, name).items():
        torch.testing.assert_close(value, expected["state"][key], rtol=1e-8, atol=1e-10, msg=key)


@pytest.mark.parametrize("axes, without_data", [((2, 1), (1, 1)), ((2, 2), (1, 2))], ids=str)
def test_the_data_axis_changes_no_bit(processes, axes, without_data):
    expected = processes.run(without_data, train, "topk", True, torch.float32)
    found = processes.run(axes, train, "topk", True, torch.float32)
    for key, value in whole(found, "topk").items():
        assert torch.equal(value, whole(expected, "topk")[key]), key
    assert torch.equal(found[-1]["losses"], expected[0]["losses"])
