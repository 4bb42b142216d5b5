"""Synthetic activations from a known sparse dictionary, to test whether training recovers it."""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor
from torch.nn.functional import normalize

from fastsae.data.prefetch import Load, Window
from fastsae.data.shuffle import Shuffle
from fastsae.data.source import Shuffled

BLOCK_ROWS = 1024  # rows generated together, from one key
WINDOW_ROWS = 8 * BLOCK_ROWS


@dataclass(frozen=True, kw_only=True)
class Synthetic(Shuffled):
    """Rows x = Σ v_i dictionary[i] + noise, with `active` latents i per row and |v_i| ≥ ½.

    A source like `ActivationShards`, without files: row n depends only on the settings and n.
    """

    d_in: int
    """Width of a row."""

    n_latents: int
    """Rows of the dictionary."""

    active: int
    """Distinct latents in each row."""

    n_tokens: int = 1_000_000
    """Rows in one epoch."""

    noise: float = 0.0
    """Standard deviation of the Gaussian noise on every entry."""

    frequency_exponent: float = 0.0
    """Latent i is drawn with weight (i + 1)^-frequency_exponent: 0 is uniform, 1 is Zipf's law."""

    signed: float = 0.0
    """Fraction of the latents, a random set, whose v_i is negative in half of the rows. The others'
    is always positive. So 0 is a dictionary of directions, 1 one of axes."""

    seed: int = 0
    """Seed of the dictionary and the rows."""

    part: Literal["train", "heldout"] = "train"
    """Which of two independent sets of rows from the same dictionary."""

    def __post_init__(self):
        for name in ("d_in", "n_latents", "active", "n_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("noise", "frequency_exponent", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.signed <= 1:
            raise ValueError(f"signed must be between 0 and 1, got {self.signed}")
        if self.active > self.n_latents:
            raise ValueError(
                f"active must be at most n_latents = {self.n_latents}, got {self.active}"
            )

    @cached_property
    def dictionary(self) -> Float32[Tensor, "n_latents d_in"]:
        """The unit-norm directions that rows are sums of."""
        drawn = self._generator(0).standard_normal((self.n_latents, self.d_in))
        return normalize(torch.from_numpy(drawn), dim=1).float()

    @cached_property
    def signed_latents(self) -> Bool[Tensor, " n_latents"]:
        """The latents with values of both signs."""
        rank = torch.from_numpy(self._generator(3).permutation(self.n_latents))
        return rank < round(self.signed * self.n_latents)

    @property
    def heldout(self) -> "Synthetic | None":
        """Up to 65,536 other rows from the same dictionary; None for the held-out part itself."""
        if self.part == "heldout":
            return None
        return replace(self, part="heldout", n_tokens=min(self.n_tokens, 65_536))

    @property
    def fingerprint(self) -> str:
        """A short hash of the settings."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    def where(self, row: int) -> str:
        """A readable name of a row."""
        return f"synthetic row {row}"

    def sample(self, n: int, seed: int = 0) -> Float32[Tensor, "_ d_in"]:
        """`n` distinct rows, or all if there are fewer; the same for the same seed. Rows are
        independent, so consecutive ones are a random sample."""
        start = np.random.Generator(np.random.PCG64(seed)).integers(self.n_tokens)
        wanted = (
            start // BLOCK_ROWS * BLOCK_ROWS + np.arange(min(n, self.n_tokens))
        ) % self.n_tokens
        return torch.from_numpy(self.gather(wanted))

    def shuffled(self, seed: int) -> tuple[Shuffle, Load]:
        def load(rows: Int64[np.ndarray, " window"]) -> Window:
            return self.gather(rows).__getitem__

        return Shuffle(self.n_tokens, seed, WINDOW_ROWS, BLOCK_ROWS), load

    def recovery(self, W_dec: Float[Tensor, "d_sae d_in"]) -> float:
        """Mean over dictionary rows of the largest cosine similarity with a decoder row; 1 if every
        direction was found. That of a signed latent may have either sign."""
        cosine = self.dictionary @ normalize(W_dec.detach().to("cpu", torch.float32), dim=1).T
        cosine = torch.where(self.signed_latents[:, None], cosine.abs(), cosine)
        return float(cosine.max(1).values.mean())

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, *key])))

    def gather(self, wanted: Int64[np.ndarray, " N"]) -> Float32[np.ndarray, "N d_in"]:
        out = np.empty((len(wanted), self.d_in), np.float32)
        blocks = wanted // BLOCK_ROWS
        for block in np.unique(blocks).tolist():
            places = blocks == block
            out[places] = self._block(block)[wanted[places] % BLOCK_ROWS]
        return out

    def _block(self, number: int) -> Float32[np.ndarray, "rows d_in"]:
        draw = self._generator(1 if self.part == "train" else 2, number)
        # Exponential race: the smallest arrival times are a weighted draw without replacement.
        weights = np.arange(1, self.n_latents + 1, dtype=np.float32) ** -self.frequency_exponent
        clocks = draw.standard_exponential((BLOCK_ROWS, self.n_latents), np.float32) / weights
        chosen = np.argpartition(clocks, self.active - 1, axis=1)[:, : self.active]
        values = 0.5 + 0.5 * draw.standard_exponential(chosen.shape, np.float32)
        rows = self.noise * draw.standard_normal((BLOCK_ROWS, self.d_in), np.float32)
        if self.signed:  # drawn last: magnitudes and noise are those of positive values
            negative = draw.random(chosen.shape, np.float32) < 0.5
            values[negative & self.signed_latents.numpy()[chosen]] *= -1
        for place in range(self.active):
            rows += values[:, place, None] * self.dictionary.numpy()[chosen[:, place]]
        return rows.astype(np.float32, copy=False)
