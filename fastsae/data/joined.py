"""Activations of the same tokens from several sources, concatenated."""

import hashlib
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int, Int64
from torch import Tensor

from fastsae.data.prefetch import Load, Window
from fastsae.data.shards import WINDOW_BYTES
from fastsae.data.shuffle import Shuffle
from fastsae.data.source import Contexts, Shuffled, StoredActivations, TextActivations

COMPARED = 1024  # rows whose tokens are compared between sources
READ_ROWS = 4096  # rows read from a source at a time


class Joined(Shuffled):
    """A source whose row n is the concatenation of the rows n of several sources.

    For a transcoder the sources are a module's input and output, for a crosscoder the layers of a
    model. They must have the same tokens in the same order, as hookpoints that were harvested
    together do. ValueError if their numbers of rows differ, or the tokens of some rows, where the
    sources know their tokens.
    """

    def __init__(self, *sources: StoredActivations):
        if not sources:
            raise ValueError("Joined needs at least one source, got none")
        counts = [source.n_tokens for source in sources]
        if len(set(counts)) > 1:
            raise ValueError(f"joined sources must have the same number of rows, got {counts}")
        self.sources = sources
        self.widths = tuple(source.d_in for source in sources)
        """Width of each source's rows, in order."""
        self.d_in = sum(self.widths)
        self.hookpoint = None
        """Rows are from several ones."""
        self.n_tokens = counts[0]
        self._with_contexts = [
            (place, source)
            for place, source in enumerate(sources, 1)
            if isinstance(source, TextActivations) and source.has_contexts
        ]
        self._check_tokens()
        fingerprints = ",".join(source.fingerprint for source in sources)
        self.fingerprint = hashlib.sha256(fingerprints.encode()).hexdigest()[:16]
        self.heldout = _heldout(sources)
        """The held-out rows of all sources; None if one of them has none."""

    def _check_tokens(self) -> None:
        if len(self._with_contexts) < 2:
            return
        rows = torch.linspace(0, self.n_tokens - 1, min(self.n_tokens, COMPARED)).round().long()
        first, *others = [(place, source.contexts(rows)) for place, source in self._with_contexts]
        for place, found in others:
            same = (found.token_ids == first[1].token_ids) & (found.positions == first[1].positions)
            if not same.all():
                raise ValueError(
                    f"joined sources must hold the same tokens in the same order: sources "
                    f"{first[0]} and {place} differ in row {int(rows[~same][0])}"
                )

    @property
    def model(self) -> str | None:
        """The model that the rows come from, if a source knows it."""
        return self._with_contexts[0][1].model if self._with_contexts else None

    @property
    def harvest(self) -> dict[str, Any]:
        """The settings that the model's source was harvested with."""
        return self._with_contexts[0][1].harvest if self._with_contexts else {}

    @property
    def has_contexts(self) -> bool:
        """Whether one of the sources knows the tokens of its rows."""
        return bool(self._with_contexts)

    def contexts(self, indices: Int[Tensor, " N"]) -> Contexts:
        """Tokens, positions and documents of the rows at `indices`; ValueError if unknown."""
        if not self._with_contexts:
            raise ValueError("none of the joined sources has token ids")
        return self._with_contexts[0][1].contexts(indices)

    def gather(self, rows: Int64[np.ndarray, " N"]) -> Float32[np.ndarray, "N d_in"]:
        wanted = torch.from_numpy(rows)
        return torch.cat([source.rows(wanted) for source in self.sources], 1).numpy()

    def where(self, row: int) -> str:
        """The row's name in the source that has its largest entry, or a NaN."""
        parts = [source.rows(torch.tensor([row])) for source in self.sources]
        peaks = [float(part.abs().nan_to_num(torch.inf).max()) for part in parts]
        place = peaks.index(max(peaks))
        return f"source {place + 1} of {len(parts)}, {self.sources[place].where(row)}"

    def shuffled(self, seed: int) -> tuple[Shuffle, Load]:
        """An order of its own, which depends on `seed`, the epoch and the total width only."""
        order = Shuffle(self.n_tokens, seed, WINDOW_BYTES // (4 * self.d_in))
        buffer = np.empty((min(order.window_rows, self.n_tokens), self.d_in), np.float32)

        def load(rows: Int64[np.ndarray, " window"]) -> Window:
            for start in range(0, len(rows), READ_ROWS):
                part = rows[start : start + READ_ROWS]
                buffer[start : start + len(part)] = self.gather(part)
            return buffer.__getitem__

        return order, load


def _heldout(sources: tuple[StoredActivations, ...]) -> Joined | None:
    parts = [part for source in sources if (part := source.heldout) is not None]
    if len(parts) < len(sources):
        return None
    try:
        return Joined(*parts)
    except ValueError as error:
        raise ValueError(f"the sources' held-out parts: {error}") from error
