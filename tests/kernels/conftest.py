"""Every test that asks for a device runs twice: on the torch path and on the Triton kernels."""

import os
from collections.abc import Iterator

import pytest
import torch

from fastsae_kernels._launch import interpreted

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic products on CUDA


@pytest.fixture(params=["torch", "triton"])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "torch":
        yield "cpu"
    elif torch.cuda.is_available():
        yield "cuda"
    else:
        request.getfixturevalue("fast_interpreter")
        with interpreted():
            yield "cpu"
