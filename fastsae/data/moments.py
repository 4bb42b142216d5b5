"""Statistics of a stream of activations, accumulated in float64."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from fastsae.data.index import Norm


class Summary(NamedTuple):
    mean: tuple[float, ...]
    mean_square: float
    norm: Norm


class Moments:
    """Mean, mean square and row norms of the rows added so far."""

    def __init__(self, d_in: int):
        self.n_tokens = 0
        self._sum = np.zeros(d_in)
        self._norms = np.zeros(2)  # of the row norms: their sum and the sum of their squares
        self._smallest, self._largest = math.inf, 0.0

    def add(self, x: Float32[np.ndarray, "N d_in"]) -> None:
        if not len(x):
            return
        wide = x.astype(np.float64)
        squares = np.einsum("nd,nd->n", wide, wide)
        norms = np.sqrt(squares)
        self.n_tokens += len(x)
        self._sum += wide.sum(0)
        self._norms += norms.sum(), squares.sum()
        self._smallest = min(self._smallest, float(norms.min()))
        self._largest = max(self._largest, float(norms.max()))

    def summary(self) -> Summary:
        """Mean row, mean square over all entries, and the row norms. Needs at least one row."""
        norm, square = (float(total) / self.n_tokens for total in self._norms)
        return Summary(
            mean=tuple((self._sum / self.n_tokens).tolist()),
            mean_square=square / len(self._sum),
            norm=Norm(
                mean=norm,
                std=math.sqrt(max(0.0, square - norm * norm)),
                min=self._smallest,
                max=self._largest,
            ),
        )
