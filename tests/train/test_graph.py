"""What a step does where it cannot be recorded; tests/gpu records one."""

from contextlib import contextmanager

import pytest
import torch

from fastsae import SAE, TopK
from fastsae.losses import Objective
from fastsae.train.graph import EAGER, CapturedStep
from fastsae.train.optim import Adam
from fastsae.train.step import fused_step


@contextmanager
def refused(graph, **options):
    raise RuntimeError("operation not permitted when stream is capturing")
    yield


def weights_after(steps: int, captured: bool, required: bool = False) -> list[torch.Tensor]:
    torch.manual_seed(0)
    sae, objective = SAE(8, 32, TopK(4)), Objective()
    adam = Adam(sae)
    step = CapturedStep(sae, adam, objective, required) if captured else None
    for x in torch.randn(steps, 16, 8):
        adam.begin_step(1e-3)
        if step is None:
            fused_step(sae, adam, x, None, objective)
        else:
            step(x)
    return list(sae.parameters())


@pytest.fixture
def no_capture(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", refused)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)


def test_steps_stay_eager_where_recording_fails(no_capture):
    with pytest.warns(UserWarning, match="launched one by one: operation not permitted") as found:
        captured = weights_after(EAGER + 3, captured=True)
    assert len(found) == 1, "it is tried once"
    for one, two in zip(captured, weights_after(EAGER + 3, captured=False), strict=True):
        assert torch.equal(one, two)


def test_recording_that_is_required_raises(no_capture):
    with pytest.raises(RuntimeError, match="operation not permitted"):
        weights_after(EAGER + 1, captured=True, required=True)
