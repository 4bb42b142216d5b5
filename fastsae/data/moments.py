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
        self._counts = np.zeros(1 << 15, np.int64)  # of norms, by their upper 16 bits in float32

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
        bins = norms.astype(np.float32).view(np.int32) >> 16
        self._counts += np.bincount(bins, minlength=len(self._counts))

    def summary(self) -> Summary:
        """Mean row, mean square over all entries, and the row norms. Needs at least one row."""
        norm, square = (float(total) / self.n_tokens for total in self._norms)
        bins = np.arange(len(self._counts), dtype=np.int32)
        middles = ((bins << 16) + (1 << 15)).view(np.float32)
        median = middles[np.searchsorted(self._counts.cumsum(), self.n_tokens / 2)]
        huge = self._counts[middles > 10 * median].sum() / self.n_tokens
        return Summary(
            mean=tuple((self._sum / self.n_tokens).tolist()),
            mean_square=square / len(self._sum),
            norm=Norm(
                mean=norm,
                std=math.sqrt(max(0.0, square - norm * norm)),
                min=self._smallest,
                max=self._largest,
                median=float(median),
                huge_fraction=float(huge),
            ),
        )
