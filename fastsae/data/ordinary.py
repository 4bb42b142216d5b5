"""Where the ordinary tokens of a source lie, whatever a few extreme ones are like.

Transformers give a few tokens, mostly the first of a text, a norm hundreds of times that of the
others (attention sinks, arXiv:2309.17453). Those would dominate a mean, a mean square and an FVU.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

SAMPLE_TOKENS = 8192
"""Tokens from which the ordinary ones are found."""

ROWS, COLUMNS = 1024, 64
"""Part of a sample of which a copy in float64 exists at a time."""

MAX_NORM_RATIO = 10.0
"""By default, ordinary tokens are at most this many times as far from the mean as the median."""


class Ordinary(NamedTuple):
    """Mean and spread of the ordinary tokens: those that are near the mean, measured by the median
    distance from it."""

    mean: Float[Tensor, " D"]
    spread: float
    """Root mean square distance of the ordinary tokens from their mean."""
    limit: float
    """The largest distance of an ordinary token; infinite if all tokens are."""

    @classmethod
    def of(cls, sample: Float[Tensor, "N D"], max_norm_ratio: float | None) -> "Ordinary":
        """From a sample of tokens."""
        ratio = math.inf if max_norm_ratio is None else max_norm_ratio
        ordinary, _ = near(sample, sample.median(0).values, ratio)
        columns = sample[ordinary].split(COLUMNS, dim=1)
        mean = torch.cat([part.double().mean(0) for part in columns]).to(sample)
        ordinary, limit = near(sample, mean, ratio)
        spread = float(distances(sample[ordinary], mean).square().mean().sqrt())
        return cls(mean, spread, limit)

    def has(self, x: Float[Tensor, "N D"]) -> Bool[Tensor, " N"]:
        """Which tokens are ordinary."""
        return distances(x, self.mean.to(x)) <= self.limit

    @property
    def gamma(self) -> float:
        """|mean| / |std|: where it is large, latents die (arXiv:2605.31518)."""
        return float(self.mean.double().norm()) / self.spread


def distances(x: Float[Tensor, "N D"], center: Float[Tensor, " D"]) -> Float64[Tensor, " N"]:
    norm = partial(torch.linalg.vector_norm, dim=1, dtype=torch.float64)
    return torch.cat([norm(part - center) for part in x.split(ROWS)])


def near(
    sample: Float[Tensor, "N D"], center: Float[Tensor, " D"], ratio: float
) -> tuple[Bool[Tensor, " N"], float]:
    """Which tokens are within `ratio` times the median distance from the center, and that limit."""
    distance = distances(sample, center)
    limit = ratio * (float(distance.median()) or math.inf)
    return distance <= limit, limit


def check_max_norm_ratio(ratio: float | None) -> None:
    """ValueError unless more than half of the tokens can be ordinary."""
    if ratio is not None and not ratio > 1:
        raise ValueError(f"max_norm_ratio must be above 1, or none to keep all tokens, got {ratio}")
