"""How much of the activations an SAE keeps, and how it uses its dictionary to do so."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor
from torch.nn.functional import cosine_similarity

from fastsae.codes import Codes
from fastsae.data.prefetch import checked
from fastsae.data.source import ActivationSource
from fastsae.nn.sae import SAE
from fastsae.progress import progress_bar

DENSE = 0.1  # a latent active on more than this fraction of the tokens is dense


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """How an SAE reconstructs some tokens."""

    tokens: int
    """Tokens evaluated."""

    fvu: float
    """Fraction of variance unexplained: sum |x - recon|^2 / sum |x - mean(x)|^2."""

    mse: float
    """Mean of the squared error over tokens and coordinates."""

    l0: float
    """Active latents per token, on average."""

    dead_fraction: float
    """Fraction of the latents that were active for none of the tokens."""

    dense_fraction: float
    """Fraction of the latents that were active for more than 10 % of the tokens."""

    utilisation: float
    """How many latents the dictionary is worth, as a fraction of those it has: exp(H) / d_sae,
    where H is the entropy of which latent an active entry is of. 1 if all latents fire equally
    often; 1 / d_sae if one fires alone; 0 if none fires. It falls when few latents do most of the
    work, also where none is dead."""

    cosine: float
    """Cosine between a token and its reconstruction, on average."""

    relative_norm: float
    """|recon| / |x|, on average; a token of norm 0 counts as 1."""

    pc_retention: dict[str, float]
    """By number r of leading principal components u of the tokens: the mean over them of
    max(0, 1 - Var(u . (x - recon)) / Var(u . x))."""


@torch.no_grad()
def reconstruction(
    sae: SAE,
    data: ActivationSource,
    *,
    max_tokens: int | None = None,
    batch_size: int = 4096,
    device: str | torch.device | None = None,
    pc_ranks: Sequence[int] | None = None,
    progress: bool = False,
) -> Reconstruction:
    """Reconstructs the first `max_tokens` rows of data (by default all) and measures the result.

    A row of a transcoder's data is its input and its target side by side (`Joined`); what is
    measured is how well it predicts the target. One pass in the data's own order; memory is a
    batch and two covariances; sums are float64, so that the batch size changes nothing but
    rounding. `sae` is moved to `device`, if given. `pc_ranks` defaults to 16, 64 and half the
    output's width; a rank beyond the width counts as it. ValueError for data of another width,
    without rows, with NaN or Inf, or whose rows are all the same.
    """
    check_fits(sae, data)
    width = len(sae.b_dec)
    ranks = (16, 64, max(width // 2, 1)) if pc_ranks is None else tuple(pc_ranks)
    tokens = data.n_tokens if max_tokens is None else min(max_tokens, data.n_tokens)
    if min(tokens, batch_size, *ranks) < 1:
        raise ValueError(
            f"tokens, batch_size and pc_ranks must be at least 1, "
            f"got {tokens}, {batch_size} and {ranks}"
        )
    sae = sae.to(device or sae.b_dec.device)
    totals = _Totals(width, sae.d_sae, sae.b_dec.device)
    bar = progress_bar("reconstruction", "token", tokens, shown=progress)
    with evaluation_mode(sae), bar:
        for x in _in_order(data, tokens, batch_size):
            x = x.to(sae.b_dec)
            x, target = (x, x) if sae.d_out is None else x.split([sae.d_in, width], dim=1)
            codes = sae.encode(x)
            totals.add(target.double(), sae.decode(codes, x).double(), codes)
            bar.update(len(x))
    return totals.summary(ranks)


@contextmanager
def evaluation_mode(sae: SAE) -> Iterator[None]:
    """While active, sae codes each token as it will when it is used: alone, without noise."""
    training = sae.training
    sae.eval()
    try:
        yield
    finally:
        sae.train(training)


def check_fits(sae: SAE, data: ActivationSource) -> None:
    """ValueError unless the rows of data are what sae takes, and returns if it is a transcoder."""
    if data.d_in != sae.d_in + (sae.d_out or 0):
        ends = f"d_in = {sae.d_in}" + (f" and d_out = {sae.d_out}" if sae.d_out else "")
        raise ValueError(f"the SAE has {ends}, the data has rows of {data.d_in}")


def pc_retention(
    cov: Float64[Tensor, "D D"], residual_cov: Float64[Tensor, "D D"], ranks: Sequence[int]
) -> dict[str, float]:
    """Mean retention of the r leading principal components, for each r in ranks.

    A direction in which the data does not vary has nothing to retain and is left out of the mean.
    """
    variance, components = torch.linalg.eigh(cov)
    variance, components = variance.flip(0), components.flip(1)
    lost = torch.einsum("di,di->i", components, residual_cov @ components).clamp_min(0)
    varies = variance > variance[0] * len(variance) * torch.finfo(variance.dtype).eps
    kept = (1 - lost[varies] / variance[varies]).clamp_min(0)
    widths = sorted({min(rank, len(variance)) for rank in ranks})
    return {str(rank): float(kept[:rank].mean()) for rank in widths}


class _Totals:
    """Sums over tokens, on the device, from which everything is computed at the end."""

    def __init__(self, d_in: int, d_sae: int, device: torch.device):
        self.tokens = 0
        self.inputs = _Covariance(d_in, device)
        self.residuals = _Covariance(d_in, device)
        self.error, self.cosine, self.norm = torch.zeros(3, dtype=torch.float64, device=device)
        self.fired = torch.zeros(d_sae, dtype=torch.int64, device=device)

    def add(self, x: Float64[Tensor, "N D"], recon: Float64[Tensor, "N D"], codes: Codes) -> None:
        residual = x - recon
        self.tokens += len(x)
        self.inputs.add(x)
        self.residuals.add(residual)
        self.error += residual.square().sum()
        self.cosine += cosine_similarity(x, recon, dim=1).sum()
        norm = x.norm(dim=1)
        self.norm += torch.where(norm > 0, recon.norm(dim=1) / norm, 1).sum()
        self.fired += _fires(codes)

    def summary(self, ranks: Sequence[int]) -> Reconstruction:
        n, cov = self.tokens, self.inputs.value()
        variance = float(cov.trace())
        same = torch.finfo(torch.float64).eps * float(self.inputs.about.square().sum())
        if variance <= same:
            raise ValueError(f"the {n} tokens are all the same: there is no variance to explain")
        return Reconstruction(
            tokens=n,
            fvu=float(self.error) / (n * variance),
            mse=float(self.error) / (n * len(cov)),
            l0=int(self.fired.sum()) / n,
            dead_fraction=float((self.fired == 0).double().mean()),
            dense_fraction=float((self.fired > DENSE * n).double().mean()),
            utilisation=_utilisation(self.fired),
            cosine=float(self.cosine) / n,
            relative_norm=float(self.norm) / n,
            pc_retention=pc_retention(cov, self.residuals.value(), ranks),
        )


def _fires(codes: Codes) -> Int64[Tensor, " d_sae"]:
    """For how many of the tokens each latent is active."""
    if codes.indices is None:
        return codes.active.sum(0)
    return torch.bincount(codes.indices[codes.active], minlength=codes.d_sae)


def _utilisation(fired: Int64[Tensor, " d_sae"]) -> float:
    if not fired.any():
        return 0.0
    share = fired.double() / fired.sum()
    return float(torch.special.entr(share).sum().exp()) / len(fired)


class _Covariance:
    """Covariance of a stream of rows, taken about the first batch's mean against cancellation."""

    def __init__(self, d_in: int, device: torch.device):
        self.tokens = 0
        self.about = torch.zeros(d_in, dtype=torch.float64, device=device)
        self.sum = torch.zeros_like(self.about)
        self.products = self.sum.new_zeros(d_in, d_in)

    def add(self, x: Float64[Tensor, "N D"]) -> None:
        if not self.tokens:
            self.about = x.mean(0)
        x = x - self.about
        self.tokens += len(x)
        self.sum += x.sum(0)
        self.products.addmm_(x.T, x)

    def value(self) -> Float64[Tensor, "D D"]:
        mean = self.sum / self.tokens
        return self.products / self.tokens - mean.outer(mean)


def _in_order(
    data: ActivationSource, tokens: int, batch_size: int
) -> Iterator[Float32[Tensor, "N d_in"]]:
    for start in range(0, tokens, batch_size):
        rows = torch.arange(start, min(start + batch_size, tokens))
        x = data.rows(rows)
        checked(x.numpy(), rows.numpy(), data.where)
        yield x
