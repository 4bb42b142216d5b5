"""When each latent is active: the codes of some tokens, by latent."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int32, Int64
from torch import Tensor

from fastsae.codes import Codes
from fastsae.data import StoredActivations
from fastsae.evals.reconstruction import Reconstruction, check_fits, evaluation_mode, reconstruction
from fastsae.nn import SAE

from .config import ReportConfig

MOST_ENTRIES = 16_000_000
"""Active entries that are kept, of 8 bytes each."""
BLOCK_TOKENS = 1024
"""Consecutive tokens that are taken of data of which not all are."""


@dataclass(frozen=True, kw_only=True)
class Firings:
    """The active entries of the codes of some tokens, sorted by latent, then by token."""

    rows: Int64[Tensor, " tokens"]
    """Numbers of the tokens' rows in the data."""

    places: Int32[np.ndarray, " E"]
    """For each entry, the place of its token in `rows`."""

    values: Float32[np.ndarray, " E"]
    """Activations, none of them 0."""

    starts: Int64[np.ndarray, " d_sae_plus_1"]
    """Where each latent's entries start, and where the last one's end."""

    found: Reconstruction
    """The metrics of these tokens."""

    inputs: "InputMoments | None"
    """Sums of the SAE's inputs, if they were asked for."""

    @property
    def counts(self) -> Int64[np.ndarray, " d_sae"]:
        """For how many tokens each latent is active."""
        return np.diff(self.starts)

    def of(self, latent: int) -> tuple[Int32[np.ndarray, " M"], Float32[np.ndarray, " M"]]:
        """The places of the tokens that a latent is active on, increasing, and its activations."""
        own = slice(self.starts[latent], self.starts[latent + 1])
        return self.places[own], self.values[own]


class InputMoments:
    """Sums over tokens of the SAE's inputs x, which correlations with latents are computed from.

    All are of x - shift, where shift is the first batch's mean: less cancels out.
    """

    shift: Float64[Tensor, " d_in"]
    sums: Float64[Tensor, " d_in"]
    squares: Float64[Tensor, " d_in"]

    def __init__(self, sae: SAE):
        self.shift = sae.W_enc.new_zeros(sae.d_in, dtype=torch.float64)
        self.sums, self.squares = self.shift.clone(), self.shift.clone()
        self.empty = True

    def add(self, x: Float32[Tensor, "N d_in"]) -> None:
        if self.empty:
            self.shift, self.empty = x.double().mean(0), False
        wide = x.double() - self.shift
        self.sums += wide.sum(0)
        self.squares += wide.square().sum(0)


class _Kept:
    """The active entries of each batch, and sums of inputs."""

    def __init__(self, inputs: InputMoments | None):
        self.places: list[np.ndarray] = []
        self.latents: list[np.ndarray] = []
        self.values: list[np.ndarray] = []
        self.inputs = inputs

    def add(self, places: Int64[Tensor, " N"], x: Float32[Tensor, "N d_in"], codes: Codes) -> None:
        if self.inputs is not None:
            self.inputs.add(x)
        active = codes.active
        token, entry = active.nonzero(as_tuple=True)
        self.places.append(places[token.cpu()].int().numpy())
        self.latents.append(codes.latents()[token, entry].int().cpu().numpy())
        self.values.append(codes.values[token, entry].float().cpu().numpy())


def collect(
    sae: SAE, data: StoredActivations, config: ReportConfig, progress: bool = True
) -> Firings:
    """Encode tokens of the data in one pass, and keep their codes; and sums of the inputs, if
    dashboards are to be written.

    ValueError for data of another width, or where `reconstruction` raises one.
    """
    kept = _Kept(InputMoments(sae) if config.neuronpedia else None)
    rows = spread(data.n_tokens, most_tokens(sae, data, config))
    found = reconstruction(
        sae,
        data,
        rows=rows,
        batch_size=config.batch_size,
        pc_ranks=(),
        max_norm_ratio=config.max_norm_ratio,
        progress=progress,
        observe=kept.add,
    )
    latents = np.concatenate(kept.latents)
    order = np.argsort(latents, kind="stable")  # tokens come in order
    counts = np.bincount(latents, minlength=sae.d_sae)
    return Firings(
        rows=rows,
        places=np.concatenate(kept.places)[order],
        values=np.concatenate(kept.values)[order],
        starts=np.concatenate([[0], np.cumsum(counts)]),
        found=found,
        inputs=kept.inputs,
    )


@torch.no_grad()
def most_tokens(sae: SAE, data: StoredActivations, config: ReportConfig) -> int:
    """The tokens to encode, so that no more than MOST_ENTRIES are active."""
    check_fits(sae, data)
    x = data.sample(256)[:, : sae.d_in]
    with evaluation_mode(sae):
        l0 = float(sae.encode(x.to(sae.b_dec)).l0())
    return max(1, min(config.max_tokens, int(MOST_ENTRIES / max(l0, 1.0))))


def spread(n: int, most: int, block: int = BLOCK_TOKENS) -> Int64[Tensor, " tokens"]:
    """All of n rows, or about `most` of them in blocks of consecutive ones, spread evenly."""
    if n <= most:
        return torch.arange(n)
    block = min(block, most)
    starts = torch.arange(most // block) * n // (most // block)
    return (starts[:, None] + torch.arange(block)).flatten()
