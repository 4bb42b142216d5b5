"""Rational SAE (RSAE, arXiv:2606.14990): a trained non-linearity shared by all latents.

    phi(h) = c_out r((h - s) / c_in),   r(t) = P(t) / (1 + |S(t)|),   t clamped to [-1, 1]

s is where the gate of the activation that phi takes over from opens: 0 for ReLU, the latent's
threshold for JumpReLU, and for TopK the middle between the token's k-th and (k + 1)-th largest
pre-activation, held constant; or it is 0. phi is 0 nowhere, so the gate still says which latents
are active; then phi need not express the jump at t = 0, and starts without its steep slopes.
Without a support it must, and starts as the best fit to the whole activation.

Where phi rises it is the proximal step of some R, the one with R'(phi(h)) = h - phi(h): to train
phi is to choose the regulariser.

Coefficients span 12 orders of magnitude, more than one learning rate can serve. What is trained is
a change from where they started, in units that each alter r by its own size (our choice):

    a = a0 + unit_a change_a      b = b0 + unit_b change_b      c = c0 exp(change_c)

Degree (p, 0) is a polynomial, S = 0, whose c are held. So (1, 0) scales and shifts what the gate
keeps: two scalars, against which the others can be compared.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from fastsae.codes import Codes, check_k
from fastsae.config import check_choices
from fastsae_kernels import encode_topk, rational, topk

from .activation import Activation, ActivationConfig, Inputs, Penalized, Targets, Weights
from .penalty import Coefficient, check_penalty
from .rational_fit import DEFAULT_DEGREE, JUMP, RationalFit, initial_coefficients
from .sparse_pre import SparsePre

Gate = Literal["relu", "jumprelu", "topk"]
Support = Literal["teacher", "none"]
Center = Literal["gate", "zero"]

DEFAULT_K = 32

MAX_DEGREE = 64


@dataclass(frozen=True, kw_only=True)
class RationalConfig(ActivationConfig):
    """Rational SAE: a learned rational function of the latents that a gate selects."""

    name = "rational"

    gate: Gate = "topk"
    """Activation whose rule selects the active latents."""

    support: Support = "teacher"
    """teacher: only the latents that the gate selects are active. none: all are, so L0 is d_sae and
    decoding is dense."""

    center: Center = "gate"
    """Center of the function: the gate's threshold, as in the paper, or zero, where it can start as
    an exact copy of the gate's activation."""

    k: int | None = None
    """Active latents per token, for the gate topk (default: 32)."""

    degree: tuple[int, int] | None = None
    """Degrees (p, q) of numerator and denominator (default: 3 2 for the gate relu, 9 8 for the
    others). 1 0 is a trained scale and shift."""

    l1_coef: float = 0.0
    """L1 coefficient, relative to the squared error per token."""

    target_l0: float | None = None
    """Target L0. If set, the coefficient is adapted to reach it, and the penalty's gradient is
    shared among latents by how far their gates are open. Not for the gate topk, whose L0 is k, nor
    with support none."""

    def __post_init__(self):
        check_choices(self, gate=Gate, support=Support, center=Center)
        if self.center == "zero" and (self.gate == "relu" or self.support == "none"):
            raise ValueError(
                f'center "zero" is for the gates jumprelu and topk with the support of a teacher, '
                f'got the gate "{self.gate}" with support "{self.support}"'
            )
        if self.k is not None and self.gate != "topk":
            raise ValueError(f'k = {self.k} has no effect with the gate "{self.gate}"')
        if self.k is not None:
            check_k(self.k)
        degree = self.degree or (0, 1)
        if len(degree) != 2 or not 0 <= min(degree) <= max(degree) <= MAX_DEGREE or not any(degree):
            allowed = f"two numbers from 0 to {MAX_DEGREE}, not both 0"
            raise ValueError(f"degree must be {allowed}, got {self.degree}")
        check_penalty(self.l1_coef, self.target_l0, "l1_coef")
        if self.target_l0 is not None and (self.gate == "topk" or self.support == "none"):
            raise ValueError(
                f"target_l0 = {self.target_l0} needs a sparsity penalty that can change L0: not "
                f'with the gate "{self.gate}" and support "{self.support}"'
            )


class Rational(Activation, config=RationalConfig):
    """A rational function of what a gate keeps. The arguments are those of RationalConfig.

    Without a teacher (`fastsae.upgrade`), it starts as its gate's activation for inputs of mean
    square 1 and encoder rows of norm 1: c_in = c_out = sqrt(d_in), so that t is about the cosine of
    token and row, less the gate's; the gate jumprelu is at a tenth of c_in, that of topk is taken
    to be. Thresholds are held constant: the support of latent j depends on its threshold and
    b_enc[j] through their difference alone, and b_enc is trained. Training may bend phi below 0.
    """

    cfg: RationalConfig
    start: Float[Tensor, " coefficients"]
    """a0, then b0."""
    unit: Float[Tensor, " coefficients"]
    scale: Float[Tensor, "2"]
    """c_in and c_out as they started."""
    change: Float[nn.Parameter, " coefficients"]
    scale_change: Float[Tensor, "2"]
    threshold: Float[Tensor, " d_sae"]
    """With the gate jumprelu only."""

    @property
    def degree(self) -> tuple[int, int]:
        like = "relu" if self.cfg.gate == "relu" else "jumprelu"
        return self.cfg.degree or DEFAULT_DEGREE[like]

    @property
    def k(self) -> int:
        return self.cfg.k or DEFAULT_K

    def build(self, d_in: int, d_sae: int) -> None:
        self.coefficient = Coefficient(self.cfg.l1_coef, self.cfg.target_l0)
        self.target_l0 = self.coefficient.target_l0
        if self.cfg.gate == "topk":
            check_k(self.k, d_sae)
        count = sum(self.degree) + 1
        self.change = nn.Parameter(torch.zeros(count))
        if self.degree[1]:
            self.scale_change = nn.Parameter(torch.zeros(2))
        else:
            self.register_buffer("scale_change", torch.zeros(2))
        for name, size in {"start": count, "unit": count, "scale": 2}.items():
            self.register_buffer(name, torch.zeros(size))
        size = math.sqrt(d_in)
        self.start_from_(self.fit(JUMP)._replace(c_in=size, c_out=size))
        if self.cfg.gate == "jumprelu":
            self.register_buffer("threshold", torch.full((d_sae,), JUMP * size))

    @property
    def activation_threshold(self) -> Float[Tensor, " d_sae"] | float | None:
        if self.cfg.gate == "topk" or self.cfg.support == "none":
            return None
        return self.threshold if self.cfg.gate == "jumprelu" else 0.0

    def fit(self, jump: float, whole: bool = False) -> RationalFit:
        """The best fit to the gate's activation where phi is taken of it, at c_in = c_out = 1.

        The jump is from 0 at t = 0; there is none, whatever is given, for ReLU and the center 0.
        With `whole` it is fitted for all t even if the gate says which are active.
        """
        jump = 0.0 if self.cfg.gate == "relu" or self.cfg.center == "zero" else jump
        if self.cfg.support == "teacher" and not whole:
            return linear_fit(self.degree, jump)
        return gate_fit(self.degree, jump)

    @torch.no_grad()
    def start_from_(self, fit: RationalFit) -> None:
        """Start from these coefficients and scales; ValueError for other degrees than the own."""
        found = len(fit.a) - 1, len(fit.b)
        if found != self.degree:
            raise ValueError(f"the fit must have degree {self.degree}, got {found}")
        self.start.copy_(torch.cat([fit.a, fit.b]))
        self.unit.copy_(units(fit, self.cfg.support))
        self.scale.copy_(torch.tensor([fit.c_in, fit.c_out]))
        self.change.zero_()
        self.scale_change.zero_()

    def coefficients(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """a [p + 1], b [q] (a single 0 for q = 0), c_in and c_out [] as they are now."""
        p, q = self.degree
        a, b = torch.addcmul(self.start, self.unit, self.change).split([p + 1, q])
        b = b if q else a.new_zeros(1)
        c_in, c_out = (self.scale * self.scale_change.exp()).unbind()
        return a, b, c_in, c_out

    def gated(
        self, x: Float[Tensor, "N d_in"], weights: Weights
    ) -> tuple[SparsePre, Tensor | float]:
        """The pre-activations that phi is taken of, which of them the gate keeps, and s.

        s is 0 or of a shape that broadcasts to theirs. A token with fewer than k + 1 positive
        pre-activations has 0 in place of the missing ones, and so for the middle.
        """
        W_enc, b_enc, *_ = weights
        d_sae = len(W_enc)
        threshold = self.threshold if self.cfg.gate == "jumprelu" else 0.0
        if self.cfg.support == "none":
            pre = linear(x, W_enc, b_enc)
            if self.cfg.gate == "topk":
                largest, _ = topk(pre.detach(), min(self.k + 1, d_sae))
                threshold = middle(largest, self.k)
            return SparsePre(pre, None, pre > threshold, d_sae), threshold
        at_zero = self.cfg.center == "zero"
        if self.cfg.gate == "topk":
            count = self.k if at_zero else min(self.k + 1, d_sae)
            largest, indices = encode_topk(x, W_enc, b_enc, count)
            pre, indices = largest[:, : self.k], indices[:, : self.k]
            s = 0.0 if at_zero else middle(largest.detach(), self.k)
            return SparsePre(pre, indices, pre > 0, d_sae), s
        found = SparsePre.above(x, W_enc, b_enc, threshold)
        if at_zero or not isinstance(threshold, Tensor):
            return found, 0.0
        return found, found.pick(threshold)

    def encode(self, x: Inputs, weights: Weights) -> Codes:
        return self.codes(*self.gated(x, weights))

    def codes(self, found: SparsePre, s: Tensor | float) -> Codes:
        """phi of what the gate found, shifted by s."""
        values = rational(found.pre, *self.coefficients(), s)
        return Codes.every(values) if self.cfg.support == "none" else found.codes(values)

    def penalized(self, x: Inputs, target: Targets, weights: Weights, progress: float) -> Penalized:
        found, s = self.gated(x, weights)
        codes = self.codes(found, s)
        norm = codes.values.abs().sum()
        if self.cfg.target_l0 is not None:
            threshold = self.activation_threshold
            threshold = found.pick(threshold) if isinstance(threshold, Tensor) else 0.0
            opening = found.codes(found.pre - threshold).values.sum()
            norm = opening * (norm / opening.clamp_min(torch.finfo(opening.dtype).tiny)).detach()
        return codes, self.coefficient(norm / max(len(x), 1), codes.l0())

    def after_step(self, codes: Codes) -> None:
        self.coefficient.after_step(self.shards.l0(codes))

    @torch.no_grad()
    def fold_scale_(self, scale: float) -> None:
        self.scale.div_(scale)
        if self.cfg.gate == "jumprelu":
            self.threshold.div_(scale)


def middle(largest: Float[Tensor, "N K"], k: int) -> Float[Tensor, "N 1"]:
    """Halfway between the k-th largest of each row and the next one, or 0 if none is listed."""
    following = largest[:, k:] if largest.shape[1] > k else 0.0
    return (largest[:, k - 1 : k] + following) / 2


def linear_fit(degree: tuple[int, int], jump: float) -> RationalFit:
    """About t + jump on [0, 1], with S = t^2, or t for q = 1; exactly if p exceeds that degree.

    Any S does that P has room for, but from S = 0, where |S| has a kink, b could not be trained.
    """
    (p, q), power = degree, min(degree[1], 2)
    with torch.device("cpu"):
        t = torch.linspace(0, 1, 1001, dtype=torch.float64)[:, None]
        columns = t ** torch.arange(min(p, power + 1) + 1) / (1 + t**power if q else 1)
        a = torch.linalg.lstsq(columns, t + jump).solution
        error = (columns @ a - t - jump).abs().max().item()
        b = torch.zeros(q, dtype=torch.float64)
        b[power - 1 : power] = 1
    return RationalFit(pad(a[:, 0], (0, p + 1 - len(a))), b, 1.0, 1.0, error)


@cache
def gate_fit(degree: tuple[int, int], jump: float) -> RationalFit:
    """The best fit on [-1, 1], on the CPU also where modules are built without memory."""
    with torch.device("cpu"):
        if not jump:
            return initial_coefficients("relu", degree)
        return initial_coefficients("jumprelu", degree, jump)


def units(fit: RationalFit, support: Support) -> Float[Tensor, " coefficients"]:
    """By how much each of a and b alone alters r by r's own size, in the mean square over the t
    on which r is taken: those above 0, or all of [-1, 1]."""
    with torch.device("cpu"):
        a, b = fit.a.double().cpu(), fit.b.double().cpu()
        t = torch.linspace(-1 if support == "none" else 0, 1, 1001, dtype=torch.float64)
        powers = t[:, None] ** torch.arange(max(len(a), len(b) + 1))
        Q = 1 + (powers[:, 1 : len(b) + 1] @ b).abs()
        r = powers[:, : len(a)] @ a / Q
        slopes = torch.cat([powers[:, : len(a)], r[:, None] * powers[:, 1 : len(b) + 1]], 1)
        return r.norm() / (slopes / Q[:, None]).norm(dim=0)
