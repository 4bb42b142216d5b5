"""Variational SAE (vSAE, arXiv:2509.22994): TopK of a noisy code with a Gaussian prior.

    mu = max(h, 0),  z = the k largest magnitudes of mu + sigma epsilon,  epsilon ~ N(0, 1)
    sigma_f = u exp(v_f / 2)                                        of log-variance v_f; 0 if fixed
    u^2 KL = sum_f (mu_f^2 + u^2 (exp v_f - 1 - v_f)) / 2           of all latents, to N(0, u^2 I)

Training minimizes the squared error plus beta u^2 KL; outside training, epsilon is 0, and the code
is TopK's, the proximal step of the same regulariser. With variance "none", what the published runs
computed, training too is TopK's, plus beta |mu|^2 / 2. The KL is summed over chunks of tokens.

The paper scales tokens to norm 1 and minimizes |error|^2 + beta KL to N(0, I). Inputs here have
mean square 1 per coordinate, so x and mu are sqrt(d_in) times as large. With sigma as large as
before against mu, u is sqrt(d_in), and all terms of the loss are d_in times the paper's: beta is
the paper's beta, also without noise. That is noise "token"; "coordinate" is u = 1.
"""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from fastsae.codes import Codes, check_k
from fastsae.config import check_choices
from fastsae_kernels import encode_topk, rows_at_a_time, topk_indices

from .activation import Activation, ActivationConfig, Inputs, Penalized, Targets, Weights, warmed
from .penalty import check_warmup

Variance = Literal["none", "fixed", "learned"]
Noise = Literal["coordinate", "token"]
LOG_VARIANCE = -6.0, 2.0


@dataclass(frozen=True, kw_only=True)
class VariationalConfig(ActivationConfig):
    """Variational SAE: TopK of a noisy code with a Gaussian prior."""

    name = "variational"

    k: int = field(default=32, kw_only=False)
    """Active latents per token."""

    variance: Variance = "none"
    """Variance of the noise: none, fixed at that of the prior, or learned by a second encoder per
    token and latent."""

    noise: Noise | None = None
    """Standard deviation of the prior, which noise starts in proportion to: the root mean square of
    an input's coordinates (coordinate, the default), or the norm of an input (token), as in the
    paper, which is sqrt(d_in) times as large."""

    beta: float = 0.001
    """KL coefficient, relative to the squared error per token. The paper's, 0.5 to 1, is in the
    same units."""

    sparsity_warmup: float = 0.1
    """Fraction of training over which the sparsity coefficient warms up."""

    def __post_init__(self):
        check_k(self.k)
        check_choices(self, variance=Variance)
        if self.noise not in (None, *get_args(Noise)):
            raise ValueError(f"noise must be one of {get_args(Noise)}, got {self.noise!r}")
        if self.noise is not None and self.variance == "none":
            raise ValueError(f'noise = {self.noise} has no effect with variance "none"')
        if not self.beta >= 0:
            raise ValueError(f"beta must be at least 0, got {self.beta}")
        check_warmup(self.sparsity_warmup)


class Variational(Activation, config=VariationalConfig):
    """Keeps the k largest latents of a noisy code. The arguments are those of VariationalConfig."""

    cfg: VariationalConfig

    def build(self, d_in: int, d_sae: int) -> None:
        check_k(self.cfg.k, d_sae)
        if self.cfg.variance == "learned":
            self.W_variance = nn.Parameter(torch.zeros(d_sae, d_in))
            self.b_variance = nn.Parameter(torch.full((d_sae,), -2.0))

    def encode(self, x: Inputs, weights: Weights) -> Codes:
        return Codes(*encode_topk(x, *weights[:2], self.cfg.k), len(weights.W_enc))

    def penalized(self, x: Inputs, target: Targets, weights: Weights, progress: float) -> Penalized:
        kl, parts = x.new_zeros(()), []
        for rows in x.split(rows_at_a_time(x, weights.W_enc.shape[0])):
            seed = int(torch.randint(2**62, ()))  # of torch's CPU generator, on any device
            # Done again when it is differentiated, so that no chunk's pre-activations are kept.
            arguments = rows, weights.W_enc, weights.b_enc, seed
            values, indices, divergence = checkpoint(self.sample, *arguments, use_reentrant=False)
            parts.append((values, indices))
            kl = kl + divergence
        values, indices = (torch.cat(part) for part in zip(*parts, strict=True))
        codes = Codes(values, indices, len(weights.W_enc))
        penalty = warmed(progress, self.cfg.sparsity_warmup) * self.cfg.beta
        return codes, penalty * kl / max(len(x), 1)

    def sample(
        self, x: Tensor, W_enc: Tensor, b_enc: Tensor, seed: int
    ) -> tuple[Float[Tensor, "N k"], Tensor, Float[Tensor, ""]]:
        """Values and indices of the noisy code, and u^2 KL summed over these tokens."""
        mean = linear(x, W_enc, b_enc).relu()
        unit = math.sqrt(x.shape[1]) if self.cfg.noise == "token" else 1.0
        z, divergence = mean, mean.square().sum()
        if self.cfg.variance != "none":
            generator = torch.Generator(x.device).manual_seed(seed)
            noise = torch.randn(mean.shape, generator=generator, dtype=x.dtype, device=x.device)
            if self.cfg.variance == "learned":
                log_variance = linear(x, self.W_variance, self.b_variance).clamp(*LOG_VARIANCE)
                noise = noise * (log_variance / 2).exp()
                excess = (log_variance.exp() - 1 - log_variance).sum()
                divergence = divergence + unit**2 * excess
            z = mean + unit * noise
        indices = topk_indices(z, self.cfg.k, "abs")
        return z.gather(1, indices), indices, divergence / 2

    @torch.no_grad()
    def fold_scale_(self, scale: float) -> None:
        if self.cfg.variance == "learned":
            self.W_variance.mul_(scale)

    @torch.no_grad()
    def fold_mean_(self, mean: Float[Tensor, " d_in"], weights: Weights) -> None:
        if self.cfg.variance == "learned":
            self.b_variance.sub_(self.W_variance @ mean)

    @torch.no_grad()
    def fold_columns_(self, factors: Float[Tensor, " d_in"]) -> None:
        if self.cfg.variance == "learned":
            self.W_variance.mul_(factors)
