"""Directions of latents: which ones are alike, and a map of all of them."""

import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from fastsae.nn import SAE

from .config import Projection
from .contexts import number

NEAREST = 6
MOST_POINTS = 4096
"""Latents on the map, those with a card among them."""
GRID = 1000
"""Coordinates on the map are from 0 to this."""


def neighbors(sae: SAE, latents: Int64[Tensor, " n"]) -> list[list[list[Any]]]:
    """For each latent, the others whose decoder rows have the largest cosine with its own (of
    signed codes, the largest in size): their numbers and cosines."""
    rows = normalize(sae.W_dec.detach().float(), dim=1)
    found = []
    for some in latents.split(64):
        cosines = rows[some] @ rows.T
        cosines[torch.arange(len(some)), some] = 0.0
        size = cosines.abs() if sae.activation.signed else cosines
        best = size.topk(min(NEAREST, len(rows) - 1), dim=1).indices
        for places, values in zip(best.tolist(), cosines.gather(1, best).tolist(), strict=True):
            found.append([[i, number(v)] for i, v in zip(places, values, strict=True)])
    return found


def encoder_decoder_cosines(
    sae: SAE, latents: Int64[Tensor, " n"]
) -> Float32[np.ndarray, " n"] | None:
    """The cosine of each latent's encoder and decoder rows; None for a transcoder, whose rows are
    in different spaces."""
    if sae.d_out is not None:
        return None
    rows = (weight.detach()[latents].float() for weight in (sae.W_enc, sae.W_dec))
    return cosine_similarity(*rows, dim=1).cpu().numpy()


def latent_map(
    sae: SAE,
    counts: Int64[np.ndarray, " d_sae"],
    cards: Int64[Tensor, " n"],
    projection: Projection,
    seed: int,
) -> dict[str, Any]:
    """The decoder rows in two dimensions: of the latents with a card and of others that are active,
    up to MOST_POINTS."""
    own = cards.numpy()
    alive = np.setdiff1d(np.flatnonzero(counts), own)
    room = max(MOST_POINTS - len(own), 0)
    if len(alive) > room:
        generator = np.random.Generator(np.random.PCG64(seed))
        alive = generator.choice(alive, room, replace=False)
    shown = np.sort(np.concatenate([own, alive]))
    if not len(shown):
        empty = dict.fromkeys(("counts", "ids", "x", "y"), [])
        return {"about": "No latent is active", "grid": GRID, **empty}
    rows = normalize(sae.W_dec.detach()[torch.from_numpy(shown)].float().cpu(), dim=1)
    if projection == "auto":
        projection = "umap" if has_umap() else "pca"
    flat, about = umap(rows, seed) if projection == "umap" else pca(rows)
    low, high = flat.min(0), flat.max(0)
    whole = np.rint((flat - low) / np.maximum(high - low, 1e-12) * GRID).astype(int)
    points = {"ids": shown.tolist(), "x": whole[:, 0].tolist(), "y": whole[:, 1].tolist()}
    return {"about": about, "grid": GRID, "counts": counts[shown].tolist(), **points}


def pca(rows: Float[Tensor, "n D"]) -> tuple[Float[np.ndarray, "n 2"], str]:
    """Scores on the two leading principal components, with a fixed sign."""
    centered = (rows - rows.mean(0)).double()
    variances, components = torch.linalg.eigh(centered.T @ centered)
    first = components.flip(1)[:, : min(2, centered.shape[1])]
    largest = first.abs().argmax(0)
    first = first * first.gather(0, largest[None]).sign()
    scores = torch.zeros(len(rows), 2, dtype=torch.float64)
    scores[:, : first.shape[1]] = centered @ first
    share = float(variances.flip(0)[:2].sum() / variances.sum().clamp_min(1e-300))
    return scores.numpy(), f"PCA: the two components hold {share:.0%} of the variance"


def has_umap() -> bool:
    """Whether umap-learn is installed: another package has the name that is imported."""
    try:
        return bool(version("umap-learn"))
    except PackageNotFoundError:
        return False


def umap(rows: Float[Tensor, "n D"], seed: int) -> tuple[Float[np.ndarray, "n 2"], str]:
    """UMAP by cosine; ValueError if it is not installed, or there are too few rows."""
    if not has_umap():
        raise ValueError("projection umap needs umap-learn: pip install umap-learn, or use pca")
    if len(rows) < 16:
        raise ValueError(f"projection umap needs at least 16 latents, got {len(rows)}: use pca")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of parts that need TensorFlow, and of a single thread
        from umap import UMAP  # pyright: ignore[reportMissingImports]

        fitted = UMAP(metric="cosine", random_state=seed, n_jobs=1).fit_transform(rows.numpy())
    about = "UMAP by cosine: neighbors write alike, distances between clusters mean little"
    return np.asarray(fitted, np.float64), about
