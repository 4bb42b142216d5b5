"""JumpReLU (arXiv:2407.14435): a threshold for each latent, trained with an L0 penalty.

The proximal step of R(z) = sum_f lambda_f 1[z_f != 0] for z >= 0, infinite for z < 0, is h where
h > sqrt(2 lambda_f) and else 0: a JumpReLU of threshold sqrt(2 lambda_f). Training minimizes the
squared error plus l0_coef |z|_0, or plus l0_coef (L0 / target_l0 - 1)^2 with the batch's L0.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fastsae.codes import Codes
from fastsae_kernels import jumprelu, jumprelu_l0

from .activation import Activation, ActivationConfig, Inputs, Penalized, Targets, Weights, warmed
from .penalty import check_penalty, check_warmup, target_of
from .sparse_pre import SparsePre


@dataclass(frozen=True, kw_only=True)
class JumpReLUConfig(ActivationConfig):
    """JumpReLU: a learned threshold per latent, with an L0 penalty."""

    name = "jumprelu"

    threshold: float = 0.001
    """Initial threshold, for activations with mean square 1."""

    bandwidth: float = 0.001
    """Bandwidth of the threshold's straight-through estimator; short runs need a wider one."""

    l0_coef: float | None = None
    """L0 coefficient, relative to the squared error per token. With a target L0, the coefficient of
    (L0 / target - 1)^2 (default: d_in)."""

    target_l0: float | None = None
    """Target L0 of the penalty (default: 32 when no coefficient is given)."""

    sparsity_warmup: float = 0.1
    """Fraction of training over which the sparsity coefficient warms up."""

    def __post_init__(self):
        if not self.threshold >= 0:
            raise ValueError(f"threshold must be at least 0, got {self.threshold}")
        if not self.bandwidth > 0:
            raise ValueError(f"bandwidth must be above 0, got {self.bandwidth}")
        check_penalty(self.l0_coef, self.target_l0, "l0_coef")
        check_warmup(self.sparsity_warmup)


class JumpReLU(Activation, config=JumpReLUConfig):
    """Keeps every pre-activation above its latent's threshold. The arguments are those of
    JumpReLUConfig.

    Where gradients are needed, entries just below their threshold are listed too, as inactive.
    """

    cfg: JumpReLUConfig
    threshold: Float[nn.Parameter, " d_sae"]

    def build(self, d_in: int, d_sae: int) -> None:
        self.threshold = nn.Parameter(torch.full((d_sae,), self.cfg.threshold))
        self.target_l0 = target_of(self.cfg.l0_coef, self.cfg.target_l0)

    @property
    def activation_threshold(self) -> Float[Tensor, " d_sae"]:
        return self.threshold.clamp(min=0)  # an average over steps can be below

    def encode(self, x: Inputs, weights: Weights) -> Codes:
        found, pre, threshold = self.found(x, weights, torch.is_grad_enabled())
        return self.codes(found, pre, threshold)

    def found(self, x: Tensor, weights: Weights, trained: bool) -> tuple[SparsePre, Tensor, Tensor]:
        """Latents above their threshold (or in its window, if thresholds are trained), and what
        `with_thresholds` returns for them."""
        threshold = self.threshold.clamp(min=0)  # a file can hold one below 0
        lowest = threshold.detach() - (self.cfg.bandwidth / 2 if trained else 0.0)
        found = SparsePre.above(x, weights.W_enc, weights.b_enc, lowest)
        return found, *with_thresholds(found, threshold)

    def codes(self, found: SparsePre, pre: Tensor, threshold: Tensor) -> Codes:
        return jumprelu_codes(found, pre, threshold, self.cfg.bandwidth)

    def penalized(self, x: Inputs, target: Targets, weights: Weights, progress: float) -> Penalized:
        found, pre, threshold = self.found(x, weights, True)
        codes = self.codes(found, pre, threshold)
        l0 = jumprelu_l0(pre, threshold, self.cfg.bandwidth).sum()
        l0 = self.shards.total(l0) / max(len(x), 1)
        missed = l0 if self.target_l0 is None else (l0 / self.target_l0 - 1).square()
        coef = float(x.shape[1]) if self.cfg.l0_coef is None else self.cfg.l0_coef
        return codes, (warmed(progress, self.cfg.sparsity_warmup) * coef * missed).to(x)

    @torch.no_grad()
    def after_step(self, codes: Codes) -> None:
        self.threshold.clamp_(min=0)  # below 0, it would get no gradient

    @torch.no_grad()
    def fold_scale_(self, scale: float) -> None:
        self.threshold.clamp_(min=0).div_(scale)


def with_thresholds(found: SparsePre, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Pre-activations and thresholds in the ops' shapes: [N, d_sae] and [d_sae] if dense, else one
    row of all entries, [1, M] and [M]."""
    threshold = found.pick(threshold)
    pre = found.pre.masked_fill(~found.active, -torch.inf)
    return (pre, threshold) if threshold.dim() == 1 else (pre.view(1, -1), threshold.flatten())


def jumprelu_codes(found: SparsePre, pre: Tensor, threshold: Tensor, bandwidth: float) -> Codes:
    """Codes of what `with_thresholds` returned."""
    return found.codes(jumprelu(pre, threshold, bandwidth).view(found.pre.shape))
