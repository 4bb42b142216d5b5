"""Gated SAE (arXiv:2404.16014): one set of weights decides whether a latent is active and how much.

    gate       pi = h = x W_enc^T + b_enc              active where pi > 0
    magnitude  z = max(exp(r_mag) (x W_enc^T) + b_mag, 0)
    penalty    l1_coef |max(pi, 0)|_1 + |y - (max(pi, 0) W_dec + b_dec)|^2

The penalty holds the decoder constant (except its norms, if the SAE is by_norm). The gate is the
proximal step of ReLU's regulariser; the magnitude is free of its shrinkage.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fastsae.codes import Codes

from .activation import Activation, Inputs, Penalized, Targets, Weights, warmed
from .penalty import Coefficient, L1Config
from .sparse_pre import SparsePre


@dataclass(frozen=True, kw_only=True)
class GatedConfig(L1Config):
    """Gated SAE: an L1-penalized gate selects latents; a separate head sets their magnitude."""

    name = "gated"


class Gated(Activation, config=GatedConfig):
    """Keeps latents whose gate is open. The arguments are those of GatedConfig."""

    cfg: GatedConfig
    r_mag: Float[nn.Parameter, " d_sae"]
    b_mag: Float[nn.Parameter, " d_sae"]

    def build(self, d_in: int, d_sae: int) -> None:
        self.coefficient = Coefficient(self.cfg.l1_coef, self.cfg.target_l0)
        self.target_l0 = self.coefficient.target_l0
        self.r_mag, self.b_mag = (nn.Parameter(torch.zeros(d_sae)) for _ in range(2))

    @property
    def activation_threshold(self) -> float:
        return 0.0

    def encode(self, x: Inputs, weights: Weights) -> Codes:
        open_gates = SparsePre.above(x, weights.W_enc, weights.b_enc, 0.0)
        return self.magnitudes(open_gates, weights.b_enc)

    def magnitudes(self, open_gates: SparsePre, b_enc: Float[Tensor, " d_sae"]) -> Codes:
        """Codes of the latents with an open gate."""
        r, b, bias = (open_gates.pick(p) for p in (self.r_mag, self.b_mag, b_enc))
        return open_gates.codes((r.exp() * (open_gates.pre - bias) + b).relu())

    def penalized(self, x: Inputs, target: Targets, weights: Weights, progress: float) -> Penalized:
        W_enc, b_enc, W_dec, b_dec, _ = weights
        open_gates = SparsePre.above(x, W_enc, b_enc, 0.0)
        codes = self.magnitudes(open_gates, b_enc)
        gates = open_gates.codes(open_gates.pre)
        by_gates = self.shards.total(gates.decode(W_dec.detach())) + b_dec.detach()
        norm = self.shards.total(gates.values.sum())
        penalty = self.coefficient(norm, self.shards.l0(codes))
        penalty = warmed(progress, self.cfg.sparsity_warmup) * penalty
        cost = (penalty + (target.detach() - by_gates).square().sum()) / max(len(x), 1)
        return codes, cost

    def after_step(self, codes: Codes) -> None:
        self.coefficient.after_step(self.shards.l0(codes))

    @torch.no_grad()
    def fold_scale_(self, scale: float) -> None:
        self.b_mag.div_(scale)

    @torch.no_grad()
    def fold_mean_(self, mean: Float[Tensor, " d_in"], weights: Weights) -> None:
        self.b_mag.sub_(self.r_mag.exp() * (weights.W_enc @ mean))
