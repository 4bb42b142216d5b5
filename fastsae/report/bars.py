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


NO_BARS = Bars([], [])


def bars(values: Float32[np.ndarray, " M"]) -> Bars:
    """The histogram of finite values; without bars if there are none."""
    if not len(values):
        return NO_BARS
    # in float64: between close float32 values there are fewer others than edges of bars
    heights, edges = np.histogram(values.astype(np.float64), BARS)
    return Bars(((edges[:-1] + edges[1:]) / 2).tolist(), heights.tolist())
