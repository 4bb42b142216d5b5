"""Initialization: unit decoder rows, tied encoder, b_dec at the geometric median.

`Init` holds the choices that recipes make differently.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from fastsae.config import check_choices

from .sae import SAE

ACTIVE_VARIANCE = 0.99
"""Fraction of the data's variance in the active subspace."""

FIT_TOKENS = 4096
"""Tokens of the sample that scale a fitted encoder."""

DRAWN = 16384
"""Rows of a random matrix that are drawn at a time."""

CHUNK = 1024
"""Latents whose pre-activations exist at a time."""

Rows = Literal["random", "active_subspace"]
Encoder = Literal["fitted", "tied", "linear"]
BDecInit = Literal["median", "mean", "zero"]


@dataclass(frozen=True, kw_only=True)
class Init:
    """Initialization."""

    rows: Rows = "random"
    """Directions of the latents: random, or in the principal subspace that holds 99% of the data's
    variance, which leaves no latent dead at the start (arXiv:2508.16929)."""

    row_norm: float = 1.0
    """Norm of the decoder rows, and of tied encoder rows."""

    encoder: Encoder = "tied"
    """Encoder rows: tied (a copy of the decoder's), fitted (tied, scaled to minimize the error of
    the first reconstruction; in autoencoders with TopK, AbsTopK or BatchTopK; much as in
    arXiv:2406.04093, A.1), or linear (drawn like torch.nn.Linear's, the decoder being a normalized
    copy)."""

    b_dec: BDecInit = "median"
    """Initial b_dec: geometric median or mean of a sample of the data, or zero, which after
    centering is the mean of ordinary tokens."""

    start_l0: float | None = None
    """L0 before the first step: b_enc is set so that each latent is active on this fraction of
    d_sae of a sample of 8192 tokens, and on at least one (cf. Anthropic, January 2025 update of
    transformer-circuits.pub). Default: the activation's target_l0; without one, or with 0, b_enc is
    0."""

    def __post_init__(self):
        check_choices(self, rows=Rows, encoder=Encoder, b_dec=BDecInit)
        if not self.row_norm > 0:
            raise ValueError(f"row_norm must be above 0, got {self.row_norm}")
        if self.start_l0 is not None and not self.start_l0 >= 0:
            raise ValueError(f"start_l0 must be at least 0, got {self.start_l0}")
        if self.encoder == "linear" and (self.rows != "random" or self.row_norm != 1):
            raise ValueError(
                f'encoder "linear" draws rows of its own: got rows "{self.rows}" '
                f"and row_norm {self.row_norm}"
            )

    def check(self, sae: SAE) -> None:
        """ValueError unless the SAE can be initialized so."""
        start_l0 = self.l0_of(sae)
        if start_l0 and sae.activation.activation_threshold is None:
            raise ValueError(
                f"start_l0 = {start_l0} has no effect on {sae.activation.cfg.name}: its latents "
                "do not open at a threshold"
            )
        if start_l0 >= sae.d_sae:
            raise ValueError(
                f"an SAE starts with fewer active latents than d_sae = {sae.d_sae}, got "
                f"{start_l0}: lower target_l0, or give start_l0 = 0"
            )
        can_fit = sae.d_out is None and sae.activation.scale_equivariant
        if self.encoder == "fitted" and not can_fit:
            raise ValueError(
                "a fitted encoder is that of an autoencoder with topk, abstopk or batchtopk, got "
                f"{sae.activation.cfg.name} and d_out = {sae.d_out}"
            )

    def l0_of(self, sae: SAE) -> float:
        """The L0 to start from; 0 for none."""
        own = sae.activation.target_l0 or 0.0
        return own if self.start_l0 is None else self.start_l0


def geometric_median(
    x: Float[Tensor, "N d_in"], steps: int = 100, tolerance: float = 1e-5
) -> Float[Tensor, " d_in"]:
    """The point whose summed distance to the rows of x is least (Weiszfeld's iteration).

    Stops when it moves by less than `tolerance` of the rows' mean distance.
    """
    median = x.mean(0)
    for _ in range(steps):
        distance = (x - median).norm(dim=1)
        if not distance.any():
            break
        weight = distance.clamp_min(torch.finfo(x.dtype).eps * distance.mean()).reciprocal()
        moved = weight @ x / weight.sum()
        still = (moved - median).norm() <= tolerance * distance.mean()
        median = moved
        if still:
            break
    return median


def active_subspace(x: Float[Tensor, "N d_in"]) -> Float[Tensor, "r d_in"]:
    """An orthonormal basis of the leading principal components of x, those of 99 % of variance."""
    variance, components = torch.linalg.eigh(x.double().T.cov())
    share = variance.flip(0).clamp_min(0).cumsum(0) / variance.clamp_min(0).sum()
    rank = min(int((share < ACTIVE_VARIANCE).sum()) + 1, len(share))
    return components.flip(1)[:, :rank].T.to(x.dtype)


@torch.no_grad()
def init_from_data(
    sae: SAE,
    x: Float[Tensor, "N d_in"],
    generator: torch.Generator | None = None,
    target: Float[Tensor, "N d_out"] | None = None,
    init: Init | None = None,
) -> SAE:
    """Initialize an SAE for a sample x of its data, by default much as in arXiv:2406.04093.

    Decoder rows are random directions, encoder rows the same, of the lengths that `init` says, and
    b_dec is the geometric median of x; b_enc is 0, or such that as many latents are active as
    `init` says. ValueError if that cannot be. A transcoder takes its decoder and b_dec from a
    sample of its target, and its encoder rows on their own from x. Where processes share the
    latents, each draws its own; all need the same sample and generator.
    """
    init = init or Init()
    init.check(sae)
    x = sae.tokens(x)
    y, n, rows = x if target is None else target, sae.d_sae, sae.shards.rows(sae.d_sae)
    sae.W_dec.copy_(directions(n, rows, y, init, generator))
    sae.W_enc.copy_(sae.W_dec if target is None else directions(n, rows, x, init, generator))
    if init.encoder == "linear":
        bound = sae.d_in**-0.5
        drawn = draw_rows(torch.rand, n, rows, sae.d_in, generator).mul_(2 * bound).sub_(bound)
        sae.W_enc.copy_(drawn)
        if target is None:
            sae.W_dec.copy_(normalize(drawn, dim=-1))
    sae.b_enc.zero_()
    middle = {"median": geometric_median, "mean": lambda y: y.mean(0), "zero": lambda y: 0 * y[0]}
    sae.b_dec.copy_(middle[init.b_dec](y))
    if start_l0 := init.l0_of(sae):
        start_from_l0_(sae, x, start_l0)
    if init.encoder == "fitted":
        fit_encoder_(sae, x[:FIT_TOKENS])
    return sae


def fit_encoder_(sae: SAE, x: Float[Tensor, "N d_in"]) -> None:
    """Multiply the encoder by the factor by which x's reconstruction has the least squared error.

    The latents active on a token resemble it, and so each other: with unit-norm rows, together they
    overshoot the reconstruction.
    """
    training = sae.training
    sae.train(sae.activation.needs_autoencoder)  # without corrections, which training is without
    recon, _ = sae.activation.reconstruct(sae.center(x), sae.weights())
    sae.train(training)
    recon, wanted = recon - sae.b_dec, x - sae.b_dec
    factor = (recon * wanted).sum() / recon.square().sum()
    if 0 < factor < torch.inf:
        sae.W_enc.mul_(factor)


def start_from_l0_(sae: SAE, x: Float[Tensor, "N d_in"], l0: float) -> None:
    """Set b_enc so that each latent is active for l0 / d_sae of the tokens x, rounded up."""
    activation_threshold = sae.activation.activation_threshold
    assert activation_threshold is not None
    weights, x = sae.weights(), sae.center(x)
    rank = min(math.ceil(len(x) * l0 / sae.d_sae), len(x) - 1)
    parts = (x @ rows.T for rows in weights.W_enc.split(CHUNK))
    cut = [pre.topk(rank + 1, dim=0).values[-2:].mean(0) for pre in parts]
    norm = sae.decoder_norms().sum(1) if sae.by_norm else 1.0
    sae.b_enc.copy_((activation_threshold - torch.cat(cut)) / norm)


def directions(
    n: int, rows: slice, x: Float[Tensor, "N D"], init: Init, generator: torch.Generator | None
) -> Float[Tensor, "share D"]:
    """Some of n rows of norm `init.row_norm`: random, or inside the active subspace."""
    if init.rows == "random":
        drawn = draw_rows(torch.randn, n, rows, x.shape[1], generator)
    else:
        basis = active_subspace(x - x.mean(0))
        drawn = draw_rows(torch.randn, n, rows, len(basis), generator).to(basis) @ basis
    return init.row_norm * normalize(drawn, dim=-1)


def draw_rows(
    draw: Callable[..., Tensor], n: int, rows: slice, width: int, generator: torch.Generator | None
) -> Float[Tensor, "share width"]:
    """Some rows of a random matrix [n, width], the same whichever others are drawn: every block of
    rows has a generator of its own, the first one the generator given."""
    first = draw(min(n, DRAWN), width, generator=generator)
    if n <= DRAWN:
        return first[rows]
    key, parts = int(torch.randint(2**62, (), generator=generator)), list[Tensor]()
    for start in range(rows.start // DRAWN * DRAWN, rows.stop, DRAWN):
        own = torch.Generator().manual_seed(key + start)
        block = draw(min(n - start, DRAWN), width, generator=own) if start else first
        parts.append(block[max(rows.start - start, 0) : rows.stop - start])
    return torch.cat(parts)
