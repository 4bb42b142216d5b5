from pathlib import Path

import numpy as np
import pytest

from fastsae.data import Synthetic


@pytest.fixture(scope="session")
def activations(tmp_path_factory) -> Path:
    """A file of 4000 activations of width 16 with a planted sparse dictionary."""
    source = Synthetic(d_in=16, n_latents=40, active=3, n_tokens=4000, noise=0.01, seed=1)
    path = tmp_path_factory.mktemp("data") / "activations.npy"
    np.save(path, source.sample(4000).numpy())
    return path
