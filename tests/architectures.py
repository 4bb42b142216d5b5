"""Every architecture, as settings, and METHODS' formula of its loss with every tensor written out.

Only autograd differentiates the formula; where METHODS gives a derivative that autograd cannot
find (JumpReLU, the rotation), it is written next to the formula.
Shapes: N tokens, F latents, D and D_out widths of the input and of the output.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsae import SAE
from fastsae.losses import Objective
from fastsae.nn import ActivationConfig, TopKConfig
from fastsae.nn.batchtopk import BatchTopKConfig
from fastsae.nn.gated import GatedConfig
from fastsae.nn.jumprelu import JumpReLUConfig
from fastsae.nn.rational import Rational, RationalConfig
from fastsae.nn.relu import ReLUConfig
from fastsae.nn.variational import VariationalConfig
from fastsae_kernels.rotation import rotation_reference

D_IN, D_OUT, D_SAE, K = 16, 12, 64, 4


def fvu(**settings: Any) -> Objective:
    return Objective(error="fvu", **settings)


def log_fvu(**settings: Any) -> Objective:
    return Objective(error="log_fvu", **settings)


class Architecture(NamedTuple):
    """An activation, what is minimized, and the SAE's other settings."""

    activation: ActivationConfig
    objective: Objective = fvu()
    options: dict[str, Any] = {}

    def build(self) -> SAE:
        return SAE(D_IN, D_SAE, self.activation.build(), **self.options)


TOPK, BATCHTOPK = TopKConfig(k=K), BatchTopKConfig(k=K)
ABSTOPK = TopKConfig(k=K, by="abs")
JUMPRELU = JumpReLUConfig(threshold=0.3, bandwidth=0.5, l0_coef=0.1)
RELU, GATED = ReLUConfig(l1_coef=0.1), GatedConfig(l1_coef=0.1)
ROTATED = TopKConfig(k=K, gradient="rotation")
ROTATED_ALL = TopKConfig(k=K, gradient="rotation", rotation="dense")
LEARNED = VariationalConfig(k=K, variance="learned", beta=0.01)
TOKEN_NOISE = VariationalConfig(k=K, variance="learned", noise="token", beta=0.003)
RATIONAL = RationalConfig(k=K, l1_coef=0.02)
PREFIXES = 8, 24, D_SAE
TRANSCODER, SKIP = {"d_out": D_OUT}, {"d_out": D_OUT, "skip": True}
CROSSCODER, BY_NORM = {"layers": 2, "by_norm": True}, {"by_norm": True}
LAYER_NORM = {"layer_norm": True}

ARCHITECTURES = {
    "topk": Architecture(TOPK),
    "abstopk": Architecture(ABSTOPK),
    "rotation": Architecture(ROTATED),
    "rotation dense": Architecture(ROTATED_ALL),
    "rotation of abstopk": Architecture(TopKConfig(k=K, by="abs", gradient="rotation")),
    "batchtopk": Architecture(BATCHTOPK),
    "batchabstopk": Architecture(BatchTopKConfig(k=K, by="abs")),
    "jumprelu": Architecture(JUMPRELU),
    "jumprelu to an L0": Architecture(
        JumpReLUConfig(threshold=0.3, bandwidth=0.5, target_l0=float(K))
    ),
    "relu": Architecture(RELU),
    "relu to an L0": Architecture(ReLUConfig(target_l0=float(K))),
    "annealed relu": Architecture(ReLUConfig(l1_coef=0.1, p_end=0.8)),
    "gated": Architecture(GATED),
    "gated to an L0": Architecture(GatedConfig(target_l0=float(K))),
    "vsae without noise": Architecture(VariationalConfig(k=K, beta=0.01)),
    "vsae": Architecture(VariationalConfig(k=K, variance="fixed", beta=0.01)),
    "vsae of learned variance": Architecture(LEARNED),
    "vsae with noise in units of tokens": Architecture(TOKEN_NOISE),
    "rational": Architecture(RATIONAL),
    "rational at 0": Architecture(replace(RATIONAL, center="zero")),
    "rational of every latent": Architecture(
        RationalConfig(gate="relu", support="none", l1_coef=0.1)
    ),
    "rational relu": Architecture(RationalConfig(gate="relu", l1_coef=0.1)),
    "rational relu to an L0": Architecture(
        RationalConfig(gate="relu", l1_coef=0.1, target_l0=float(K))
    ),
    "rational jumprelu": Architecture(RationalConfig(gate="jumprelu", l1_coef=0.1)),
    "rational jumprelu to an L0": Architecture(
        RationalConfig(gate="jumprelu", l1_coef=0.1, target_l0=float(K))
    ),
    "rational jumprelu at 0 to an L0": Architecture(
        RationalConfig(gate="jumprelu", center="zero", l1_coef=0.1, target_l0=float(K))
    ),
    "matryoshka": Architecture(BATCHTOPK, fvu(prefixes=PREFIXES)),
    "matryoshka, topk": Architecture(TOPK, fvu(prefixes=PREFIXES[:2])),
    "matryoshka, relu": Architecture(RELU, fvu(prefixes=PREFIXES)),
    "matryoshka, rotation": Architecture(ROTATED, fvu(prefixes=PREFIXES)),
    "matryoshka, rational": Architecture(RATIONAL, fvu(prefixes=PREFIXES)),
    "multi-k": Architecture(TOPK, fvu(multi_k=True)),
    "multi-k, matryoshka": Architecture(ABSTOPK, fvu(multi_k=True, prefixes=PREFIXES)),
    "transcoder": Architecture(TOPK, options=TRANSCODER),
    "jumprelu transcoder": Architecture(JUMPRELU, options=TRANSCODER),
    "skip transcoder": Architecture(TOPK, options=SKIP),
    "gated skip transcoder": Architecture(GATED, options=SKIP),
    "rotation skip transcoder": Architecture(ROTATED_ALL, options=SKIP),
    "crosscoder": Architecture(RELU, options=CROSSCODER),
    "batchtopk crosscoder": Architecture(BATCHTOPK, options=CROSSCODER),
    "gated crosscoder": Architecture(GATED, options=CROSSCODER),
    "vsae crosscoder": Architecture(LEARNED, options=CROSSCODER),
    "by norm": Architecture(TOPK, options=BY_NORM),
    "rotation by norm": Architecture(ROTATED_ALL, options=BY_NORM),
    "jumprelu by norm": Architecture(JUMPRELU, options=BY_NORM),
    "gated by norm": Architecture(GATED, options=BY_NORM),
    "layer norm": Architecture(TOPK, options=LAYER_NORM),
    "layer norm skip transcoder": Architecture(TOPK, options={**SKIP, **LAYER_NORM}),
    "layer norm crosscoder": Architecture(BATCHTOPK, options={**CROSSCODER, **LAYER_NORM}),
    "jumprelu by norm, layer norm": Architecture(JUMPRELU, options={**BY_NORM, **LAYER_NORM}),
    "logarithm": Architecture(TOPK, log_fvu()),
    "logarithm of a skip transcoder": Architecture(GATED, log_fvu(), SKIP),
    "logarithm of a crosscoder": Architecture(JUMPRELU, log_fvu(), CROSSCODER),
    "logarithm, matryoshka": Architecture(RELU, log_fvu(prefixes=PREFIXES)),
    "logarithm, multi-k": Architecture(
        ABSTOPK, log_fvu(multi_k=True, prefixes=PREFIXES, auxk_error="absolute")
    ),
    "summed error": Architecture(TOPK, Objective(error="sse")),
    "relu, summed error": Architecture(RELU, Objective(error="sse")),
    "absolute auxk": Architecture(TOPK, fvu(auxk_error="absolute")),
    "absolute auxk of signed codes": Architecture(
        BatchTopKConfig(k=K, by="abs"), Objective(error="sse", auxk_error="absolute")
    ),
}


class Seen(NamedTuple):
    """What a formula of an activation starts from."""

    centered: Tensor
    linear: Tensor
    """Pre-activations h less their bias again, with the rounding that this brings, [N, F]."""
    h: Tensor
    V: Tensor
    """The decoder [F, D_out]."""
    b_dec: Tensor
    left: Tensor
    """What codes and b_dec are to reconstruct, [N, D_out]."""
    noise: Tensor | None


def kept(h: Tensor, k: int, signed: bool) -> Tensor:
    """Dense top-k codes by a stable sort."""
    rank = h.abs() if signed else h
    best = rank.sort(dim=1, descending=True, stable=True).indices[:, :k]
    codes = h * torch.zeros_like(h).scatter(1, best, 1.0)
    return codes if signed else codes.relu()


class Jump(torch.autograd.Function):
    """h 1[h > threshold], and its pseudo-derivative in the threshold."""

    @staticmethod
    def forward(ctx, h, threshold, bandwidth):
        ctx.save_for_backward(h, threshold)
        ctx.bandwidth = bandwidth
        return h * (h > threshold)

    @staticmethod
    def backward(ctx, g):
        h, threshold = ctx.saved_tensors
        window = ((h - threshold) / ctx.bandwidth).abs() < 0.5
        return g * (h > threshold), (-threshold / ctx.bandwidth * window * g).sum(0), None


class Count(torch.autograd.Function):
    """sum_f 1[h > threshold] of each token, and its pseudo-derivative in the threshold."""

    @staticmethod
    def forward(ctx, h, threshold, bandwidth):
        ctx.save_for_backward(h, threshold)
        ctx.bandwidth = bandwidth
        return (h > threshold).to(h).sum(1)

    @staticmethod
    def backward(ctx, g):
        h, threshold = ctx.saved_tensors
        window = ((h - threshold) / ctx.bandwidth).abs() < 0.5
        return None, (-1 / ctx.bandwidth * window * g[:, None]).sum(0), None


def rise(cfg: Any, progress: float) -> float:
    return min(progress / cfg.sparsity_warmup, 1.0)


def topk(activation: Any, seen: Seen, progress: float) -> tuple[Tensor, Tensor | float]:
    cfg = activation.cfg
    q = kept(seen.h, cfg.k, cfg.by == "abs")
    if cfg.gradient == "rotation":
        R = rotation_reference(seen.h, q).detach()
        reached = (q != 0) | (cfg.rotation == "dense")
        turned = torch.einsum("nij,nj->ni", R, torch.where(reached, seen.h, seen.h.detach()))
        q = q.detach() + (turned - turned.detach()) * reached
    return q, 0.0


def batchtopk(activation: Any, seen: Seen, progress: float) -> tuple[Tensor, Tensor | float]:
    cfg = activation.cfg
    total = cfg.k * len(seen.h)
    return kept(seen.h.view(1, -1), total, cfg.by == "abs").view_as(seen.h), 0.0


def jumprelu(activation: Any, seen: Seen, progress: float) -> tuple[Tensor, Tensor | float]:
    cfg, threshold = activation.cfg, activation.threshold
    l0 = Count.apply(seen.h, threshold, cfg.bandwidth).mean()
    penalty = D_IN * (l0 / cfg.target_l0 - 1) ** 2 if cfg.target_l0 else cfg.l0_coef * l0
    return Jump.apply(seen.h, threshold, cfg.bandwidth), rise(cfg, progress) * penalty


def coefficient(activation: Any, z: Tensor) -> Tensor:
    """Where it is steered, times the square of L0 / target, which is no further from 1 than e^2."""
    value, target = activation.coefficient.value, activation.coefficient.target_l0
    l0 = ((z != 0).sum() / len(z)).to(value)  # a float32, as it is reported
    return value if target is None else value * (l0 / target).log().clamp(-2, 2).mul(2).exp()


def relu(activation: Any, seen: Seen, progress: float) -> tuple[Tensor, Tensor | float]:
    cfg, z = activation.cfg, seen.h.relu()
    p = 1 + (cfg.p_end - 1) * progress
    active = z[z > 0]
    power = active.pow(p).sum()
    norm = power * (active.sum() / power).detach()
    return z, rise(cfg, progress) * coefficient(activation, z) * norm / len(z)


def gated(activation: Any, seen: Seen, progress: float) -> tuple[Tensor, Tensor | float]:
    gate, frozen = seen.h.relu(), (seen.left, seen.V, seen.b_dec)
    left, V, b_dec = (t.detach() for t in frozen)
    z = (activation.r_mag.exp() * seen.linear + activation.b_mag).relu() * (seen.h > 0)
    penalty = rise(activation.cfg, progress) * coefficient(activation, z) * gate.sum()
    return z, (penalty + (left - gate @ V - b_dec).square().sum()) / len(z)


def variational(activation: Any, seen: Seen, progress: float) -> tuple[Tensor, Tensor | float]:
    cfg, mean = activation.cfg, seen.h.relu()
    unit = seen.centered.shape[1] ** 0.5 if cfg.noise == "token" else 1.0
    z, log_variance = mean, torch.zeros_like(mean)
    if seen.noise is not None:
        if cfg.variance == "learned":
            log_variance = seen.centered @ activation.W_variance.T + activation.b_variance
            log_variance = log_variance.clamp(-6, 2)
        z = mean + unit * log_variance.exp().sqrt() * seen.noise
    kl = (mean.square() + unit**2 * (log_variance.exp() - 1 - log_variance)).sum() / 2
    return kept(z, cfg.k, signed=True), rise(cfg, progress) * cfg.beta * kl / len(z)


def gate(activation: Rational, h: Tensor) -> tuple[Tensor, Tensor | float]:
    """Which latents a rational activation's gate keeps, and where it opens."""
    cfg = activation.cfg
    if cfg.gate == "relu":
        return h > 0, 0.0
    if cfg.gate == "jumprelu":
        return h > activation.threshold, activation.threshold
    largest = h.detach().relu().sort(dim=1, descending=True).values
    last, following = largest[:, activation.k - 1 :][:, :2].split(1, dim=1)
    return (h >= last) & (h > 0), (last + following) / 2


def phi(activation: Rational, h: Tensor) -> Tensor:
    """The rational function of every pre-activation."""
    p, _ = activation.degree
    s = 0.0 if activation.cfg.center == "zero" else gate(activation, h)[1]
    coefficients = activation.start + activation.unit * activation.change
    a, b = coefficients[: p + 1], coefficients[p + 1 :]
    c_in, c_out = activation.scale * activation.scale_change.exp()
    t = ((h - s) / c_in).clamp(-1, 1)
    P = sum(a[i] * t**i for i in range(len(a)))
    S = sum(b[j] * t ** (j + 1) for j in range(len(b)))
    return c_out * P / (1 + abs(S))


def rational(activation: Any, seen: Seen, progress: float) -> tuple[Tensor, Tensor | float]:
    kept, s = gate(activation, seen.h)
    z = phi(activation, seen.h)
    if activation.cfg.support == "teacher":
        z = z.where(kept, 0.0)
    penalty = coefficient(activation, z) / len(z)
    if activation.cfg.target_l0:
        opening = (seen.h - s).where(kept, 0.0).sum()
        return z, penalty * opening * (z.abs().sum() / opening).detach()
    return z, penalty * z.abs().sum()


FORMULAS: dict[str, Callable[[Any, Seen, float], tuple[Tensor, Tensor | float]]] = {
    f.__name__: f for f in (topk, batchtopk, jumprelu, relu, gated, variational, rational)
}


def seen(sae: SAE, x: Tensor, y: Tensor, noise: Tensor | None) -> Seen:
    layers = sae.W_dec.chunk(sae.layers, dim=1)
    norm = sum(part.square().sum(1).sqrt() for part in layers) if sae.by_norm else torch.ones(D_SAE)
    centered = x if sae.d_out else x - sae.b_dec
    bias, V = (sae.b_enc * norm).to(x), (sae.W_dec.T / norm).T.to(x)
    h = centered @ (sae.W_enc.T * norm).to(x) + bias
    left = y if sae.W_skip is None else y - x @ sae.W_skip.T
    return Seen(centered, h - bias, h, V, sae.b_dec, left, noise)


def normalized(x: Tensor, layers: int) -> Tensor:
    """Each token with a mean of 0 and a deviation of 1 in each layer."""
    parts = x.chunk(layers, dim=1)
    return torch.cat([(t - t.mean(1)[:, None]) / (t.std(1)[:, None] + 1e-5) for t in parts], 1)


def variance(y: Tensor) -> Tensor:
    return (y - y.mean(0)).square().sum()


def dense_loss(
    sae: SAE,
    x: Tensor,
    y: Tensor,
    dead: Tensor | None,
    objective: Objective,
    progress: float = 1.0,
    noise: Tensor | None = None,
) -> Tensor:
    """The whole loss; y is the target, or x again."""
    if sae.layer_norm:
        x = normalized(x, sae.layers)
        y = y if sae.d_out else x
    parts, cfg, N = seen(sae, x, y, noise), sae.activation.cfg, len(x)
    z, penalty = FORMULAS[cfg.name](sae.activation, parts, progress)

    def error(z: Tensor) -> Tensor:
        return (parts.left - z @ parts.V - parts.b_dec).square().sum()

    total = error(z)
    if objective.prefixes:
        sizes = {*objective.prefixes, D_SAE}
        total = torch.stack([error(z * (torch.arange(D_SAE) < size)) for size in sizes]).mean()
    if objective.multi_k:
        total = total + error(kept(parts.h, 4 * cfg.k, cfg.by == "abs")) / 8
    unit = 1 / N if objective.error == "sse" else 1 / variance(y)
    loss, proportion = unit * (total + N * penalty), 1.0
    if objective.error == "log_fvu":
        proportion = 1 / (unit * total).detach()
        loss = torch.log(unit * total) + proportion * unit * N * penalty
    if dead is None or not len(dead) or not objective.auxk_coef:
        return loss
    k_aux = objective.k_aux or y.shape[1] // 2
    residual = (parts.left - z @ parts.V - parts.b_dec).detach()
    codes = kept(parts.h[:, dead], k_aux, sae.activation.signed)
    aux = (codes @ parts.V[dead] - residual).square().sum()
    aux = aux / (N if objective.auxk_error == "absolute" else variance(residual))
    return loss + objective.auxk_coef * min(len(dead) / k_aux, 1) * proportion * aux
