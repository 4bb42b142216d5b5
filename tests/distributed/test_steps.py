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
from tests.distributed.rounding import assert_rounding

STEPS, TOKENS = 12, 24
DEAD = 0, 3, 5, 17, 40  # of 4 shares of 16 latents, one has none and one three
FUSED = "topk", "abstopk", "batchtopk", "batchabstopk"


def start(architecture: Architecture, dtype: torch.dtype) -> SAE:
    torch.manual_seed(0)
    sae = architecture.build()
    with torch.no_grad():
        sae.b_enc.normal_(std=0.1)
        sae.b_dec.normal_()
    return sae.to(dtype)


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
    data = torch.randn(STEPS, TOKENS, sae.d_in + (sae.d_out or 0)).to(dtype)
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


def assert_same(found: list[dict[str, Any]], name: str, *settings: Any) -> None:
    """AssertionError unless the steps of a mesh, in float64, are those of one process."""
    exact, rough = (
        train(ONE_PROCESS, name, settings[0], dtype, *settings[1:])
        for dtype in (torch.float64, torch.float32)
    )
    for part in found:
        assert_rounding(*({"losses": one["losses"]} for one in (part, exact, rough)))
    assert_rounding(whole(found, name), exact["state"], rough["state"])


@pytest.mark.parametrize("axes", [(1, 2), (1, 4), (2, 2)], ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_fused_steps_of_a_mesh_are_those_of_one_process(processes, name, axes):
    assert_same(processes.run(axes, train, name, True, torch.float64), name, True)


SUPPORTED = [
    name
    for name, architecture in ARCHITECTURES.items()
    if architecture.activation.name in ("topk", "batchtopk", "jumprelu", "relu", "gated")
    and not architecture.activation.build().decodes
]


@pytest.mark.parametrize("name", SUPPORTED)
def test_differentiated_steps_of_a_mesh_are_those_of_one_process(processes, name):
    clip = 0.05 if len(name) % 3 == 0 else None
    axes = (1, 2) if len(name) % 2 else (1, 4)
    found = processes.run(axes, train, name, False, torch.float64, clip)
    assert_same(found, name, False, clip)


@pytest.mark.parametrize("axes, without_data", [((2, 1), (1, 1)), ((2, 2), (1, 2))], ids=str)
def test_the_data_axis_changes_no_bit(processes, axes, without_data):
    expected = processes.run(without_data, train, "topk", True, torch.float32)
    found = processes.run(axes, train, "topk", True, torch.float32)
    for key, value in whole(found, "topk").items():
        assert torch.equal(value, whole(expected, "topk")[key]), key
    assert torch.equal(found[-1]["losses"], expected[0]["losses"])
