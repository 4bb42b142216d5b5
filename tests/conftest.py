"""Fixtures: where to run, a fixed seed, and memory that reads as NaN until it is written."""

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: kernels can run on the CPU

# Workers that run beside each other share the processors.
torch.set_num_threads(
    max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
)


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def undrawn() -> Iterator[None]:
    """Runs leave no plot of their curves: drawing it takes several times as long as a small run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastsae.train.trainer.plot_curves", lambda *arguments: False)
        yield


@pytest.fixture(autouse=True)
def reproducible():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # also fills every torch.empty with NaN
    yield
    torch.use_deterministic_algorithms(False)
