"""Activations in memory."""

import hashlib
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Int64
from torch import Tensor

from fastsae.data.prefetch import Load, Window
from fastsae.data.shuffle import Shuffle
from fastsae.data.source import Contexts, Shuffled, StoredActivations


class ActivationArray(Shuffled):
    """Rows of a tensor or an array [tokens, d_in] of any float dtype, read as float32.

    Args:
        x: the rows; they are not copied.
        contexts: where rows come from, if it is known.
        heldout: rows set aside for evaluation.
        model, hookpoint, harvest: as in `TextActivations`.
    """

    def __init__(
        self,
        x: Float[Tensor, "N d_in"],
        contexts: Contexts | None = None,
        heldout: StoredActivations | None = None,
        *,
        model: str | None = None,
        hookpoint: str | None = None,
        harvest: dict[str, Any] | None = None,
    ):
        self._x, self._contexts = x, contexts
        self.n_tokens, self.d_in = x.shape
        self.heldout = heldout
        self.model, self.hookpoint, self.harvest = model, hookpoint, harvest or {}
        content = x.contiguous().view(torch.uint8).numpy()
        self.fingerprint = hashlib.blake2b(content.data, digest_size=8).hexdigest()

    @property
    def has_contexts(self) -> bool:
        """Whether it is known where rows come from."""
        return self._contexts is not None

    def contexts(self, indices: Int[Tensor, " N"]) -> Contexts:
        """Tokens, positions and documents of the rows at `indices`; ValueError if unknown."""
        if self._contexts is None:
            raise ValueError("these activations have no token ids")
        rows = torch.from_numpy(self.in_range(indices))
        return Contexts(*(labels[rows] for labels in self._contexts))

    def where(self, row: int) -> str:
        """The row's number."""
        return f"row {row}"

    def gather(self, rows: Int64[np.ndarray, " N"]) -> Float32[np.ndarray, "N d_in"]:
        return self._x[torch.from_numpy(rows)].float().numpy()

    def shuffled(self, seed: int) -> tuple[Shuffle, Load]:
        """All rows are permuted at once."""

        def load(rows: Int64[np.ndarray, " window"]) -> Window:
            return lambda picks: self.gather(rows[picks])

        return Shuffle(self.n_tokens, seed, self.n_tokens, block_rows=1), load
