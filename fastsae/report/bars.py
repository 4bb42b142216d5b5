"""Histograms of equal bars between the least and the largest value."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

BARS = 50
"""As many as SAEDashboard's histograms have."""


class Bars(NamedTuple):
    """A histogram."""

    middles: list[float]
    heights: list[int]
    """How many values are in each bar."""


def bars(values: Float32[np.ndarray, " M"]) -> Bars:
    """The histogram of some values; without bars if there are none."""
    if not len(values):
        return Bars([], [])
    heights, edges = np.histogram(values, BARS)
    return Bars(((edges[:-1] + edges[1:]) / 2).tolist(), heights.tolist())
