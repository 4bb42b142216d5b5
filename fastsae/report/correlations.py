"""Which inputs and which other latents vary with a latent: Pearson correlations over tokens."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int32, Int64
from torch import Tensor

from .firings import Firings, InputMoments

MOST = 3
"""Inputs, or latents, that are listed for one latent."""


class Correlated(NamedTuple):
    """The most correlated inputs or latents, largest Pearson correlation first."""

    indices: list[int]
    pearson: list[float]
    cosine: list[float]
    """Of the activations without their mean subtracted."""


class LatentSums(NamedTuple):
    """Sums of each latent's activations, and of their squares."""

    sums: Float64[np.ndarray, " d_sae"]
    squares: Float64[np.ndarray, " d_sae"]

    @classmethod
    def of(cls, firings: Firings) -> "LatentSums":
        numbers = np.repeat(np.arange(len(firings.counts)), firings.counts)
        wide, d_sae = firings.values.astype(np.float64), len(firings.counts)
        sums = (np.bincount(numbers, weights, d_sae) for weights in (wide, wide * wide))
        return cls(*sums)


def correlated_inputs(
    firings: Firings,
    own: LatentSums,
    moments: InputMoments,
    latents: list[int],
    batches: Iterable[Float32[Tensor, "_ d_in"]],
) -> list[Correlated]:
    """For each latent, the coordinates of the SAE's input that vary with it most. `batches` are the
    inputs of all of `firings.rows`, in this order."""
    n = firings.found.tokens
    shift, sums, squares = (
        part.cpu().numpy() for part in (moments.shift, moments.sums, moments.squares)
    )
    whole_squares = squares + 2 * shift * sums + n * shift * shift
    found = []
    for latent, products in zip(
        latents, input_products(firings, shift, latents, batches), strict=True
    ):
        total, square = own.sums[latent], own.squares[latent]
        pearson = ratio(
            n * products - total * sums, (n * square - total**2) * (n * squares - sums**2)
        )
        cosine = ratio(products + shift * total, square * whole_squares)
        found.append(highest(pearson, cosine) if square else NOTHING)
    return found


def input_products(
    firings: Firings,
    shift: Float64[np.ndarray, " d_in"],
    latents: list[int],
    batches: Iterable[Float32[Tensor, "_ d_in"]],
) -> Float64[np.ndarray, "n d_in"]:
    """For each latent, the sums over tokens of its activations times the inputs less `shift`.

    From the inputs once more, as sums of the first pass would take memory for the whole dictionary.
    """
    numbers = np.repeat(np.arange(len(latents)), firings.counts[latents])
    entries = [firings.of(latent) for latent in latents]
    places, values = (np.concatenate([*parts]) for parts in zip(*entries, strict=True))
    order = np.argsort(places, kind="stable")
    numbers, places, values = numbers[order], places[order], values[order]
    products = torch.zeros(len(latents), len(shift), dtype=torch.float64)
    start = 0
    for x in batches:
        some = slice(*np.searchsorted(places, [start, start + len(x)]))
        at = torch.from_numpy(np.stack([numbers[some], places[some] - start]))
        codes = torch.sparse_coo_tensor(
            at,
            torch.from_numpy(values[some]).double(),
            (len(latents), len(x)),
            check_invariants=False,
        )
        products += codes @ (x.double() - torch.from_numpy(shift))
        start += len(x)
    return products.numpy()


def correlated_latents(firings: Firings, own: LatentSums, latents: list[int]) -> list[Correlated]:
    """For each latent, the other latents that vary with it most."""
    n, tokens = firings.found.tokens, ByToken(firings)
    found = []
    for latent in latents:
        total, square = own.sums[latent], own.squares[latent]
        products = tokens.products(*firings.of(latent))
        pearson = ratio(
            n * products - total * own.sums,
            (n * square - total**2) * (n * own.squares - own.sums**2),
        )
        pearson[latent] = np.nan
        cosine = ratio(products, square * own.squares)
        found.append(highest(pearson, cosine) if square else NOTHING)
    return found


NOTHING = Correlated([], [], [])
"""Of a latent that is never active."""


class ByToken:
    """The active entries sorted by token."""

    def __init__(self, firings: Firings):
        order = np.argsort(firings.places, kind="stable")
        d_sae = len(firings.counts)
        self.latents = np.repeat(np.arange(d_sae, dtype=np.int32), firings.counts)[order]
        self.values, self.d_sae = firings.values[order], d_sae
        self.counts = np.bincount(firings.places, minlength=len(firings.rows))
        self.starts = np.cumsum(self.counts) - self.counts

    def products(
        self, places: Int32[np.ndarray, " M"], values: np.ndarray
    ) -> Float64[np.ndarray, " d_sae"]:
        """The sums over tokens of a latent's activations times those of every latent."""
        entries, counts = self.entries(places)
        weights = np.repeat(values.astype(np.float64), counts) * self.values[entries]
        return np.bincount(self.latents[entries], weights, self.d_sae)

    def entries(
        self, places: Int32[np.ndarray, " M"]
    ) -> tuple[Int64[np.ndarray, " E"], Int64[np.ndarray, " M"]]:
        """The entries of some tokens, and how many each of these has."""
        counts = self.counts[places]
        ends = np.cumsum(counts)
        shifts = np.repeat(self.starts[places] - ends + counts, counts)
        return shifts + np.arange(len(shifts)), counts


def ratio(
    products: Float64[np.ndarray, " X"], squares: Float64[np.ndarray, " X"]
) -> Float64[np.ndarray, " X"]:
    """products / sqrt(squares), from -1 to 1; NaN where nothing varies."""
    found = np.full_like(products, np.nan)
    np.divide(products, np.sqrt(squares.clip(0)), found, where=squares > 0)
    return found.clip(-1, 1)


def highest(pearson: Float64[np.ndarray, " X"], cosine: Float64[np.ndarray, " X"]) -> Correlated:
    """The MOST largest correlations that are not NaN."""
    best = np.argsort(-pearson, kind="stable")[:MOST]  # NaN comes last
    best = best[~np.isnan(pearson[best])]
    return Correlated(best.tolist(), pearson[best].tolist(), cosine[best].tolist())
