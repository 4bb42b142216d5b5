"""Real sizes on a GPU; tiny ones through Triton's interpreter where FASTSAE_TINY is set.

Without either, tests that ask for a problem are skipped: on a CPU, tests/kernels prove the same
kernels at small sizes, and the benchmark's dry run goes through these.
"""

import os
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

from bench.clock import free
from bench.problem import SHAPES, TINY, Problem
from fastsae_kernels._launch import interpreted

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic products on CUDA

DRY = bool(os.environ.get("FASTSAE_TINY"))


@pytest.fixture
def problem(request: pytest.FixtureRequest) -> Iterator[Problem]:
    """The shape with the name that the test is parametrized with, B by default."""
    if not (DRY or torch.cuda.is_available()):
        pytest.skip("needs a CUDA GPU")
    if DRY:
        request.getfixturevalue("fast_interpreter")
    name = getattr(request, "param", "B")
    sizes, device = (TINY, "cpu") if DRY else (SHAPES, "cuda")
    dtype = torch.float32 if DRY else torch.bfloat16  # the interpreter multiplies bf16 wrongly
    with interpreted() if DRY else nullcontext():
        yield Problem(name, *sizes[name], torch.device(device), dtype, dry=DRY)
    free()  # what this process caches, those beside it cannot allocate
