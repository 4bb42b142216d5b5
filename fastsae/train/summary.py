"""Contents of summary.json, and how the results of a run are read."""

from collections.abc import Callable
from pathlib import Path
from typing import NotRequired, TypedDict, TypeVar

from fastsae.config import from_json
from fastsae.files import read_json

from .forecast import Facts

T = TypeVar("T")


class Summary(TypedDict):
    """The saved SAE on data that it was not trained on, if there is some, and how training went."""

    fvu: float
    fvu_all: float
    l0: float
    dead_fraction: float
    evaluated_on: str
    """held-out data or training data."""
    evaluated_tokens: int
    left_out_of_evaluation: int
    tokens: int
    left_out_tokens: int
    gamma: tuple[float, ...]
    """|mean| / |std| of each source."""
    tokens_per_second: float
    seconds: float
    step_path: str
    """fused or autograd."""
    sae_lens: str
    """The folder of the SAE for SAELens, or why there is none."""
    ended_early: NotRequired[str]
    """Why a callback ended the run, if one did."""
    activation: NotRequired[str]
    """Its name; older versions did not store it."""
    facts: NotRequired[Facts]
    """What was planned, and what it took; not in a sweep, where SAEs share memory and time."""


def read_results(kind: Callable[..., T], path: Path) -> T:
    """The value in a JSON file, of a type such as a TypedDict or a dict of them; keys that it does
    not have are left out. ValueError names the file and the entry that is missing or invalid."""
    return from_json(kind, read_json(path), str(path))
