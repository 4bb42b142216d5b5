"""Runs on activations that are not files: evaluated on held-out rows, resumed exactly."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastsae.data import ActivationArray, IterableProducer, Stream
from fastsae.train import Sweep, TrainConfig, Trainer

from .conftest import Stop, train_config

pytestmark = pytest.mark.usefixtures("undrawn")


def config(out: Path | str = "runs/unused", **settings: Any) -> TrainConfig:
    small = {"d_sae": 64, "k": 3, "batch_size": 200, "lr": 3e-3, "log_every": 5, "steps": 30}
    return train_config(**{**small, "out": str(out), **settings})


@pytest.fixture
def x(activations: Path) -> torch.Tensor:
    return torch.from_numpy(np.load(activations))


def evaluated_on(out: Path) -> tuple[str, int]:
    found = json.loads((out / "summary.json").read_text())
    return found["evaluated_on"], found["evaluated_tokens"]


def test_a_tensor(x, tmp_path):
    sae = Trainer(config(tmp_path), x).fit()
    assert evaluated_on(tmp_path) == ("held-out data", 200)
    assert (sae(x) - x).square().mean() < 0.5 * x.var()


def test_a_function_resumes_after_it_fails(x, tmp_path):
    def stream(function):
        return Stream(IterableProducer(function, heldout_tokens=200), buffer_tokens=1000)

    def failing():
        for number, part in enumerate(sound()):
            if number == 25:
                raise Stop
            yield part

    def sound():
        return x.split(100)

    whole = config(tmp_path / "whole", checkpoint_every=5)
    expected = Trainer(whole, stream(sound)).fit()
    assert evaluated_on(whole.out) == ("held-out data", 200)
    broken = dataclasses.replace(whole, out=tmp_path / "broken")
    with pytest.raises(Stop):
        Trainer(broken, stream(failing)).fit()
    assert {path.name for path in (broken.out / "checkpoints").iterdir()} != set()
    with pytest.raises(ValueError, match="other data: these activations differ"):
        Trainer(broken, stream(lambda: (-x).split(100))).fit(resume=True)
    found = Trainer(broken, stream(sound)).fit(resume=True)
    assert torch.equal(found.W_enc, expected.W_enc)


def test_a_sweep_over_a_function_trains_what_single_runs_train(x, tmp_path):
    configs = {f"k{k}": config(k=k, steps=10) for k in (2, 3)}
    saes = Sweep(configs, lambda: x.split(100), tmp_path / "sweep").fit()
    for name, own in configs.items():
        alone = Trainer(dataclasses.replace(own, out=tmp_path / name), lambda: x.split(100))
        assert torch.allclose(alone.fit().W_enc, saes[name].W_enc, atol=1e-5)


class Rows:
    """What training itself needs of a source, and more if it is given."""

    def __init__(self, x: torch.Tensor, **more: Any):
        whole = ActivationArray(x)
        for name in ("d_in", "n_tokens", "fingerprint", "where", "sample", "batches"):
            setattr(self, name, getattr(whole, name))
        vars(self).update(more)


def test_a_source_without_rows_to_evaluate_on_is_refused_before_training(x):
    lacking = {
        "as an ActivationSource, it lacks heldout": Rows(x),
        "nothing to evaluate on: it needs heldout rows, or rows()": Rows(x, heldout=None),
        "Rows.heldout must have rows(), got Tensor": Rows(x, heldout=x),
    }
    for message, source in lacking.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            Trainer(config(), source)
    Trainer(config(), Rows(x, heldout=None, rows=x.__getitem__))
    Trainer(config(), Rows(x, heldout=ActivationArray(x)))


def test_steps_are_required_where_the_end_is_unknown(x):
    with pytest.raises(ValueError, match="steps must be given"):
        Trainer(config(steps=None), x.split(100))
