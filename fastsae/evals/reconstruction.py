"""Reconstruction quality of an SAE, and how it uses its dictionary."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float32, Float64, Int, Int64
from torch import Tensor
from torch.nn.functional import cosine_similarity

from fastsae.codes import Codes
from fastsae.data.joined import Joined
from fastsae.data.ordinary import MAX_NORM_RATIO, SAMPLE_TOKENS, Ordinary
from fastsae.data.prefetch import checked
from fastsae.data.source import ActivationSource, StoredActivations
from fastsae.meeting import everywhere
from fastsae.nn.sae import SAE
from fastsae.progress import progress_bar
from fastsae.shards import Shards

Observe = Callable[[Int64[Tensor, " N"], Float32[Tensor, "N d_in"], Codes], object]
DENSE = 0.1  # a latent active on more than this fraction of the tokens is dense


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """Reconstruction metrics."""

    tokens: int
    """Tokens evaluated: the ordinary ones."""

    left_out: int
    """Tokens left out because of their norm, such as attention sinks."""

    fvu: float
    """Fraction of variance unexplained: sum |x - recon|^2 / sum |x - mean(x)|^2."""

    fvu_all: float
    """The same of all tokens, with those left out."""

    mse: float
    """Mean squared error over tokens and coordinates."""

    l0: float
    """Mean number of active latents per token."""

    dead_fraction: float
    """Fraction of latents that were never active."""

    dense_fraction: float
    """Fraction of latents that were active for more than 10% of the tokens."""

    utilization: float
    """Effective fraction of the dictionary in use: exp(H) / d_sae, where H is the entropy of the
    distribution of active entries over latents. 1 if all latents fire equally often, 1 / d_sae if
    only one fires, 0 if none does. It also drops when few latents do most of the work and none is
    dead."""

    cosine: float
    """Mean cosine similarity of a token and its reconstruction."""

    relative_norm: float
    """Mean of |recon| / |x|; a token of norm 0 counts as 1."""

    pc_retention: dict[str, float]
    """By number r of leading principal components u of the tokens: the mean of
    max(0, 1 - Var(u . (x - recon)) / Var(u . x)) over them."""


@torch.no_grad()
def reconstruction(
    sae: SAE,
    data: StoredActivations,
    *,
    max_tokens: int | None = None,
    rows: Int[Tensor, " N"] | None = None,
    batch_size: int = 4096,
    device: str | torch.device | None = None,
    pc_ranks: Sequence[int] | None = None,
    max_norm_ratio: float | None = MAX_NORM_RATIO,
    progress: bool = False,
    observe: Observe | None = None,
) -> Reconstruction:
    """Reconstruct rows of data and measure the error.

    Args:
        sae: moved to `device` if that is given.
        data: for a transcoder, `Joined` rows of inputs and targets; measures the predicted targets.
        max_tokens: use only the first rows (default: all).
        rows: use these rows instead, by their numbers.
        pc_ranks: ranks for `pc_retention`, clamped to the output's width; by default 16, 64 and
            half that width.
        max_norm_ratio: leave out tokens that are further from the mean than this multiple of the
            median distance, in any of several sources; None keeps all.
        observe: called with the places of a batch's ordinary tokens among those used, the SAE's
            inputs there, and their codes.

    Takes one pass over the data. Memory is a batch and two covariances; sums are in float64, so the
    batch size only affects rounding. Of processes that share an SAE, the places on the data axis
    read different batches, and all get the numbers of all. ValueError for data of another width,
    without rows, with NaN or Inf, or with all rows equal.
    """
    check_fits(sae, data)
    width = len(sae.b_dec)
    ranks = (16, 64, max(width // 2, 1)) if pc_ranks is None else tuple(pc_ranks)
    if rows is None:
        rows = torch.arange(min(data.n_tokens if max_tokens is None else max_tokens, data.n_tokens))
    tokens = len(rows)
    if min(tokens, batch_size, *ranks) < 1:
        raise ValueError(
            f"tokens, batch_size and pc_ranks must be at least 1, "
            f"got {tokens}, {batch_size} and {ranks}"
        )
    sae = sae.to(device or sae.b_dec.device)
    totals = _Totals(width, len(sae.W_dec), sae.b_dec.device, bool(ranks))
    sources = data.sources if isinstance(data, Joined) else (data,)
    ordinary = [Ordinary.of(s.sample(SAMPLE_TOKENS), max_norm_ratio) for s in sources]
    widths = [source.d_in for source in sources]
    bar = progress_bar("reconstruction", "token", tokens, shown=progress)
    ends = [sae.d_in, width]
    with evaluation_mode(sae), bar:
        for places, x in _in_order(data, rows, batch_size, sae.shards):
            x = x.to(sae.b_dec)
            parts = zip(ordinary, x.split(widths, dim=1), strict=True)
            kept = torch.stack([one.has(part) for one, part in parts]).all(0)
            bar.update(min(batch_size * sae.shards.data, tokens - bar.n))
            for some, add in ((kept, totals.add), (~kept, totals.leave_out)):
                if not some.any():
                    continue
                seen, target = (x[some],) * 2 if sae.d_out is None else x[some].split(ends, 1)
                codes = sae.encode(seen)
                add(target.double(), sae.decode(codes, seen).double(), codes)
                if observe is not None and some is kept:
                    observe(places[kept.cpu()], seen, codes)
    totals.join(sae.shards)
    return totals.summary(ranks)


@contextmanager
def evaluation_mode(sae: SAE) -> Iterator[None]:
    """While active, the SAE is in evaluation mode: codes depend on the token alone, no noise."""
    training = sae.training
    sae.eval()
    try:
        yield
    finally:
        sae.train(training)


def check_fits(sae: SAE, data: ActivationSource) -> None:
    """ValueError unless rows have the width of the input (plus that of a transcoder's output)."""
    if data.d_in != sae.d_in + (sae.d_out or 0):
        widths = f"d_in = {sae.d_in}" + (f" and d_out = {sae.d_out}" if sae.d_out else "")
        raise ValueError(f"the SAE has {widths}, the data has rows of {data.d_in}")


def pc_retention(
    cov: Float64[Tensor, "D D"], residual_cov: Float64[Tensor, "D D"], ranks: Sequence[int]
) -> dict[str, float]:
    """Mean retention of the r leading principal components, for each r in ranks, without those in
    which the data does not vary."""
    variance, components = torch.linalg.eigh(cov)
    variance, components = variance.flip(0), components.flip(1)
    lost = torch.einsum("di,di->i", components, residual_cov @ components).clamp_min(0)
    varies = variance > variance[0] * len(variance) * torch.finfo(variance.dtype).eps
    kept = (1 - lost[varies] / variance[varies]).clamp_min(0)
    widths = sorted({min(rank, len(variance)) for rank in ranks})
    return {str(rank): float(kept[:rank].mean()) for rank in widths}


class _Totals:
    """Sums over tokens, kept on the device, from which the metrics are computed at the end."""

    def __init__(self, d_in: int, d_sae: int, device: torch.device, whole: bool):
        self.tokens = 0
        self.inputs = _Covariance(d_in, device, whole)
        self.residuals = _Covariance(d_in, device, whole)
        self.error, self.cosine, self.norm = torch.zeros(3, dtype=torch.float64, device=device)
        self.fired = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.left_out = 0
        self.outlying = torch.zeros(d_in, dtype=torch.float64, device=device)
        self.outlying_square, self.outlying_error = self.outlying.new_zeros(2)

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

    def leave_out(
        self, x: Float64[Tensor, "N D"], recon: Float64[Tensor, "N D"], codes: Codes
    ) -> None:
        """Count tokens that are not ordinary: only the FVU of all tokens is told of them."""
        self.left_out += len(x)
        self.outlying += x.sum(0)
        self.outlying_square += x.square().sum()
        self.outlying_error += (x - recon).square().sum()

    def join(self, shards: Shards) -> None:
        """Of this process's latents and tokens, become those of all processes."""
        self.inputs.join(shards)
        self.residuals.join(shards)
        counts = torch.tensor([self.tokens, self.left_out], device=self.fired.device)
        self.tokens, self.left_out = shards.sum_data(counts).tolist()
        sums = self.error, self.cosine, self.norm, self.outlying_square, self.outlying_error
        self.error, self.cosine, self.norm, *outlying = shards.sum_data(torch.stack(sums))
        self.outlying_square, self.outlying_error = outlying
        self.outlying = shards.sum_data(self.outlying)
        self.fired = shards.gather_latents(shards.sum_data(self.fired))

    def fvu_all(self, variance: float) -> float:
        """From the variance of the ordinary tokens, by Steiner's theorem."""
        n, more = self.tokens, self.left_out
        own = self.inputs.mean
        mean = (n * own + self.outlying) / (n + more)
        square = n * (variance + (own - mean).square().sum()) + self.outlying_square
        square += more * mean.square().sum() - 2 * mean @ self.outlying
        return float((self.error + self.outlying_error) / square)

    def summary(self, ranks: Sequence[int]) -> Reconstruction:
        if not self.tokens:
            raise ValueError(
                f"all {self.left_out} tokens have an extreme norm: raise max_norm_ratio"
            )
        n, cov = self.tokens, self.inputs.value()
        variance = float(cov.trace() if cov.ndim == 2 else cov.sum())
        same = torch.finfo(torch.float64).eps * float(self.inputs.mean.square().sum())
        if variance <= same:
            raise ValueError(f"the {n} tokens are all the same: their variance is 0")
        return Reconstruction(
            tokens=n,
            left_out=self.left_out,
            fvu=float(self.error) / (n * variance),
            fvu_all=self.fvu_all(variance),
            mse=float(self.error) / (n * len(cov)),
            l0=int(self.fired.sum()) / n,
            dead_fraction=float((self.fired == 0).double().mean()),
            dense_fraction=float((self.fired > DENSE * n).double().mean()),
            utilization=_utilization(self.fired),
            cosine=float(self.cosine) / n,
            relative_norm=float(self.norm) / n,
            pc_retention=pc_retention(cov, self.residuals.value(), ranks) if ranks else {},
        )


def _fires(codes: Codes) -> Int64[Tensor, " d_sae"]:
    """For how many of the tokens each latent is active."""
    if codes.indices is None:
        return codes.active.sum(0)
    return torch.bincount(codes.indices[codes.active], minlength=codes.d_sae)


def _utilization(fired: Int64[Tensor, " d_sae"]) -> float:
    if not fired.any():
        return 0.0
    share = fired.double() / fired.sum()
    return float(torch.special.entr(share).sum().exp()) / len(fired)


class _Covariance:
    """Covariance of a stream of rows, or its diagonal alone if that is all that is needed. Products
    are of distances from the mean, which move with it (Steiner's theorem), to avoid
    cancellation."""

    def __init__(self, d_in: int, device: torch.device, whole: bool):
        self.tokens = 0
        self.mean = torch.zeros(d_in, dtype=torch.float64, device=device)
        self.products = self.mean.new_zeros(*([d_in] * (2 if whole else 1)))

    def add(self, x: Float64[Tensor, "N D"]) -> None:
        before, n = self.tokens, len(x)
        self.tokens += n
        mean = x.mean(0)
        x, move = x - mean, mean - self.mean
        if self.products.ndim == 2:
            self.products.addmm_(x.T, x)
        else:
            self.products += x.square().sum(0)
        self.shift_(move, before * n / self.tokens)
        self.mean += move * (n / self.tokens)

    def join(self, shards: Shards) -> None:
        """Of the tokens of this process, become that of the tokens of all."""
        own, before = self.tokens, self.mean
        self.tokens = int(shards.sum_data(torch.tensor(own, device=before.device)))
        self.mean = shards.sum_data(before * own) / max(self.tokens, 1)
        move = before - self.mean
        self.shift_(move, float(own))
        self.products = shards.sum_data(self.products)

    def shift_(self, move: Float64[Tensor, " D"], tokens: float) -> None:
        """Add the product of a distance with itself, as often as there are tokens."""
        if self.products.ndim == 2:
            self.products.addr_(move, move, alpha=tokens)
        else:
            self.products += move.square() * tokens

    def value(self) -> Float64[Tensor, "..."]:
        return self.products / self.tokens


def _in_order(
    data: StoredActivations, rows: Int64[Tensor, " tokens"], batch_size: int, shards: Shards
) -> Iterator[tuple[Int64[Tensor, " N"], Float32[Tensor, "N d_in"]]]:
    """Batches of rows, with their places among these rows. Places on the data axis take turns, so
    that each batch is that of one process; in the last round, some may have an empty one. Where one
    process cannot read, all raise."""

    def read(places: Int64[Tensor, " N"]) -> Float32[Tensor, "N d_in"]:
        own = rows[places]
        x = data.rows(own) if len(own) else torch.empty(0, data.d_in, dtype=torch.float32)
        checked(x.numpy(), own.numpy(), data.where)
        return x

    for first in range(0, len(rows), batch_size * shards.data):
        start = min(first + batch_size * shards.data_rank, len(rows))
        places = torch.arange(start, min(start + batch_size, len(rows)))
        yield places, everywhere(shards, partial(read, places))
