"""Contents of summary.json."""

from typing import TypedDict


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
