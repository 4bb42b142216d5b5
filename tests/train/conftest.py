from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastsae.config import from_dict, to_dict
from fastsae.data import ActivationShards, Synthetic
from fastsae.nn.activations import CHOICES
from fastsae.train import TrainConfig
from tests.evals.conftest import gpt2 as gpt2


@pytest.fixture(scope="session")
def activations(tmp_path_factory) -> Path:
    """A file of 4000 activations of width 16 with a planted sparse dictionary."""
    source = Synthetic(d_in=16, n_latents=40, active=3, n_tokens=4000, noise=0.01, seed=1)
    path = tmp_path_factory.mktemp("data") / "activations.npy"
    np.save(path, source.sample(4000).numpy())
    return path


def train_config(*, activation: str = "topk", **settings: Any) -> TrainConfig:
    """A config from settings as the command line takes them, whatever part they belong to."""
    tree = to_dict(TrainConfig(activation=CHOICES[activation]))
    for name, value in settings.items():
        parts = [tree, *(part for part in tree.values() if isinstance(part, dict))]
        (home,) = [part for part in parts if name in part]
        home[name] = value
    return from_dict(TrainConfig, tree)


class Stop(Exception):
    pass


class StoppingShards(ActivationShards):
    """Real data whose stream breaks off after some batches, as a lost disk would."""

    def __init__(self, path, left: int):
        super().__init__(path)
        self.left = left

    def batches(self, *arguments, **settings):
        stream = super().batches(*arguments, **settings)
        shards, following = self, type(stream).take

        class Breaking(type(stream)):
            def take(self, interrupted):
                if not shards.left:
                    raise Stop
                shards.left -= 1
                return following(self, interrupted)

        stream.__class__ = Breaking
        return stream
