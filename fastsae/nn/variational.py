"""Variational SAE (vSAE, arXiv:2509.22994): TopK of a noisy code with a Gaussian prior.

    mu = max(h, 0),  z = the k largest magnitudes of mu + sigma epsilon,  epsilon ~ N(0, 1)
    KL = sum_f (mu_f^2 + sigma_f^2 - 1 - log sigma_f^2) / 2         of all latents, to N(0, I)

Training minimizes the squared error plus beta KL; outside training, epsilon is 0, and the code is
TopK's, the proximal step of the same regulariser. With variance "none", what the published runs
computed, training too is TopK's, plus beta |mu|^2 / 2. The KL is summed over chunks of tokens.
"""

from dataclasses import dataclass, field
from typing import Literal

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
LOG_VARIANCE = -6.0, 2.0


@dataclass(frozen=True, kw_only=True)
class VariationalConfig(ActivationConfig):
    """Variational SAE: TopK of a noisy code with a Gaussian prior."""

    name = "variational"

    k: int = field(default=32, kw_only=False)
    """Active latents per token."""

    variance: Variance = "none"
    """Variance of the noise: none, fixed at 1, or learned by a second encoder per token and
    latent."""

    beta: float = 0.001
    """KL coefficient (in nats), relative to the squared error per token."""

    sparsity_warmup: float = 0.1
    """Fraction of training over which the sparsity coefficient warms up."""

    def __post_init__(self):
        check_k(self.k)
        check_choices(self, variance=Variance)
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
        """Values and indices of the noisy code, and the KL summed over these tokens."""
        mean = linear(x, W_enc, b_enc).relu()
        z, divergence = mean, mean.square().sum()
        if self.cfg.variance != "none":
            generator = torch.Generator(x.device).manual_seed(seed)
            noise = torch.randn(mean.shape, generator=generator, dtype=x.dtype, device=x.device)
            if self.cfg.variance == "learned":
                log_variance = linear(x, self.W_variance, self.b_variance).clamp(*LOG_VARIANCE)
                noise = noise * (log_variance / 2).exp()
                divergence = divergence + (log_variance.exp() - 1 - log_variance).sum()
            z = mean + noise
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
