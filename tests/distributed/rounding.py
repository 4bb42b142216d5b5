"""What one process and a mesh may differ in: rounding, whose size a run in float32 tells.

They are compared in float64, where whatever is not rounding shows.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastsae
from fastsae.train.log import read_lines

EPS = torch.finfo(torch.float64).eps
RATIO = EPS / torch.finfo(torch.float32).eps


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """In which an SAE is built and trained."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def assert_rounding(
    found: Mapping[str, Tensor], exact: Mapping[str, Tensor], rough: Mapping[str, Tensor]
) -> None:
    """AssertionError unless each tensor, in float64, is as near to that of one process as its
    error in float32 allows: twice that of two results with independent rounding, scaled."""
    assert found.keys() == exact.keys() == rough.keys()
    for name, value in exact.items():
        error, own = ((x[name].double() - value).abs().amax() for x in (found, rough))
        allowed = 4 * RATIO * own + EPS * value.abs().amax()
        assert error <= allowed, f"{name}: {error:.1e} > {allowed:.1e}"


def results(out: Path) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The saved SAE's weights, and the lines of metrics without times."""
    times = "seconds", "tokens_per_second"
    lines = read_lines(out / "metrics.jsonl")
    return fastsae.load(out / "sae").state_dict(), [
        {name: value for name, value in line.items() if name not in times} for line in lines
    ]


def assert_same_run(found: Path, exact: Path, rough: Path) -> None:
    """AssertionError unless a run is that of one process up to rounding: weights and metrics."""
    runs = [results(out) for out in (found, exact, rough)]
    assert_rounding(*(weights for weights, _ in runs))
    assert_rounding(*(columns(lines) for _, lines in runs))


def columns(lines: Sequence[Mapping[str, float]]) -> dict[str, Tensor]:
    return {
        name: torch.tensor([line[name] for line in lines], dtype=torch.float64) for name in lines[0]
    }
