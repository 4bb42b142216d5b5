"""How often latents are active, and which of them get a card."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from fastsae.evals.reconstruction import DENSE

from .config import ReportConfig
from .firings import Firings

LISTED = 300
"""Dead, or dense, latents that are listed."""
BIN = 0.25
"""Width of a bar, in powers of ten."""


def choose(counts: Int64[np.ndarray, " d_sae"], config: ReportConfig) -> Int64[Tensor, " n"]:
    """The latents with a card: of those that are active, ranked by frequency and divided into as
    many equal parts as there are cards, one at random from each; and those asked for."""
    alive = np.flatnonzero(counts)
    ranked = alive[np.argsort(-counts[alive], kind="stable")]
    generator = np.random.Generator(np.random.PCG64(config.seed))
    parts = np.array_split(ranked, min(config.latents, max(len(ranked), 1)))
    drawn = [int(generator.choice(part)) for part in parts if len(part)]
    return torch.tensor(sorted({*drawn, *config.include}), dtype=torch.int64)


def frequencies(firings: Firings) -> dict[str, Any]:
    """A histogram of the logarithm of frequencies, and the dead and the dense latents."""
    counts, tokens = firings.counts, firings.found.tokens
    alive = np.log10(counts[counts > 0] / tokens)
    first = np.floor(np.log10(1 / tokens) / BIN)
    edges = np.arange(first, 1) * BIN
    bars, _ = np.histogram(alive.clip(edges[0], edges[-1]), edges)
    dead, dense = np.flatnonzero(counts == 0), np.flatnonzero(counts > DENSE * tokens)
    dense = dense[np.argsort(-counts[dense], kind="stable")]
    few = dense[:LISTED]
    return {
        "edges": edges.tolist(),
        "counts": bars.tolist(),
        "dead": {"count": len(dead), "ids": dead[:LISTED].tolist()},
        "dense": {"count": len(dense), "ids": few.tolist(), "counts": counts[few].tolist()},
    }
