"""Gated SAE (arXiv:2404.16014): one set of weights says whether a latent is active and how much.

    gate       pi = h = x W_enc^T + b_enc              active where pi > 0
    magnitude  z = max(exp(r_mag) (x W_enc^T) + b_mag, 0)
    price      l1_coef |max(pi, 0)|_1 + |y - (max(pi, 0) W_dec + b_dec)|^2

The price holds the decoder constant (but for its norms, where the SAE is by_norm). The gate is the
proximal step of ReLU's regulariser; the magnitude is free of its shrinkage.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fastsae.codes import Codes

from .activation import Activation, Pass, Weights, warmed
from .candidates import Candidates
from .penalty import Coefficient, L1Config


@dataclass(frozen=True, kw_only=True)
class GatedConfig(L1Config):
    """Gated SAE: an L1-penalized gate selects latents; a separate head sets their magnitude."""

    name = "gated"


class Gated(Activation):
    """Keeps latents whose gate is open. The arguments are those of GatedConfig."""

    cfg: GatedConfig
    r_mag: Float[nn.Parameter, " d_sae"]
    b_mag: Float[nn.Parameter, " d_sae"]

    def __init__(self, **settings: Any):
        super().__init__()
        self.cfg = GatedConfig(**settings)
        self.coefficient = Coefficient(self.cfg.l1_coef, self.cfg.target_l0)
        self.target_l0 = self.coefficient.target_l0

    def build(self, d_in: int, d_sae: int) -> None:
        self.r_mag, self.b_mag = (nn.Parameter(torch.zeros(d_sae)) for _ in range(2))

    @property
    def opens_at(self) -> float:
        return 0.0

    def encode(
        self,
        x: Float[Tensor, "N d_in"],
        W_enc: Float[Tensor, "d_sae d_in"],
        b_enc: Float[Tensor, " d_sae"],
    ) -> Codes:
        return self.magnitudes(Candidates.above(x, W_enc, b_enc, 0.0), b_enc)

    def magnitudes(self, open_gates: Candidates, b_enc: Float[Tensor, " d_sae"]) -> Codes:
        """How much latents with an open gate are active."""
        r, b, bias = (open_gates.pick(p) for p in (self.r_mag, self.b_mag, b_enc))
        return open_gates.codes((r.exp() * (open_gates.pre - bias) + b).relu())

    def training_pass(
        self,
        x: Float[Tensor, "N d_in"],
        target: Float[Tensor, "N d_out"],
        weights: Weights,
        progress: float,
    ) -> Pass:
        W_enc, b_enc, W_dec, b_dec = weights
        open_gates = Candidates.above(x, W_enc, b_enc, 0.0)
        codes = self.magnitudes(open_gates, b_enc)
        gates = open_gates.codes(open_gates.pre)
        by_gates = gates.decode(W_dec.detach()) + b_dec.detach()
        price = self.coefficient(gates.values.sum(), codes.l0())
        price = warmed(progress, self.cfg.sparsity_warmup) * price
        cost = (price + (target.detach() - by_gates).square().sum()) / max(len(x), 1)
        return Pass(codes.decode(W_dec) + b_dec, codes, cost)

    @torch.no_grad()
    def fold_scale_(self, scale: float) -> None:
        self.b_mag.div_(scale)
