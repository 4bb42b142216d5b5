"""The training loss: unexplained variance, the activation's penalty, and the aux loss (aux-k).

The fused step (train/step.py) computes the same loss, and its gradients, without autograd.

    error    = sum |y - recon|^2                                     y = x, or a transcoder's target
    FVU      = error / sum |y - mean(y)|^2                           over the batch of N tokens
    residual = y - recon, held constant
    aux      = sum |aux codes W_dec - residual|^2 / sum |residual - mean(residual)|^2
    loss     = FVU + N penalty / sum |y - mean(y)|^2 + auxk_coef * min(n_dead / k_aux, 1) * aux

With layer_norm, x stands for the normalized tokens. The penalty is per token, so that
its coefficient is relative to a token's squared error, as in papers. With nested
prefixes of the dictionary, the error is the mean of the prefixes' errors. With multi_k, a
reconstruction from 4 k latents counts an eighth as much. The aux codes of a token are its k_aux
best-ranked dead latents (Gao et al. 2024, arXiv:2406.04093, A.2). Their encoder rows are trained as
well as their decoder rows.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from fastsae.codes import Codes
from fastsae.config import check_choices
from fastsae.nn import SAE, TopK
from fastsae.nn.activation import Weights
from fastsae_kernels import buffer_bytes, nonzero_variance, topk_indices

Error = Literal["fvu", "sse"]
AuxError = Literal["relative", "absolute"]

AUX_BYTES = 64 << 20
"""Budget in bytes for pre-activations of dead latents, on a CPU."""

WIDER, WIDER_COEF = 4, 1 / 8  # arXiv:2406.04093, A.6


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Loss."""

    error: Error = "fvu"
    """Reconstruction error: fraction of the batch's variance (fvu), or squared error summed over
    coordinates and averaged over tokens (sse)."""

    prefixes: tuple[int, ...] = ()
    """Increasing sizes of nested dictionaries: the first N latents must also reconstruct on their
    own (Matryoshka SAE, arXiv:2503.17547)."""

    multi_k: bool = False
    """Multi-TopK: also reconstruct from 4 k latents, weighted by 1/8."""

    auxk_coef: float = 1 / 32
    """Coefficient of the auxiliary loss that revives dead latents; 0 disables it."""

    k_aux: int | None = None
    """Dead latents per token in the auxiliary loss (default: d_out / 2)."""

    auxk_error: AuxError = "relative"
    """Auxiliary error relative to the residual's variance, or absolute: summed over coordinates and
    averaged over tokens."""

    def __post_init__(self):
        check_choices(self, error=Error, auxk_error=AuxError)
        rising = (0, *self.prefixes)
        if any(b <= a for a, b in zip(rising, rising[1:], strict=False)):
            raise ValueError(f"prefixes must be above 0 and rise, got {self.prefixes}")
        if not self.auxk_coef >= 0:
            raise ValueError(f"auxk_coef must be at least 0, got {self.auxk_coef}")
        if self.k_aux is not None and self.k_aux < 1:
            raise ValueError(f"k_aux must be at least 1, got {self.k_aux}")
        if self.auxk_coef == 0 and self.k_aux is not None:
            raise ValueError(f"k_aux = {self.k_aux} has no effect with auxk_coef = 0")
        if self.auxk_coef == 0 and self.auxk_error != "relative":
            raise ValueError(f'auxk_error "{self.auxk_error}" has no effect with auxk_coef = 0')

    def check(self, sae: SAE) -> None:
        """ValueError unless the objective fits the SAE."""
        if self.prefixes and self.prefixes[-1] > sae.d_sae:
            raise ValueError(f"prefixes must be at most d_sae = {sae.d_sae}, got {self.prefixes}")
        if self.prefixes == (sae.d_sae,):
            raise ValueError(
                f"prefixes {self.prefixes} have no effect: all latents count always, name fewer"
            )
        if self.prefixes and getattr(sae.activation.cfg, "rotation", None) == "dense":
            raise ValueError(
                'rotation="dense" cannot be combined with prefixes; use rotation="support"'
            )
        if self.multi_k:
            top_k = isinstance(sae.activation, TopK) and sae.activation.supports_fused_step
            if not top_k or sae.activation.cfg.k * WIDER > sae.d_sae:
                raise ValueError(
                    f"multi_k needs topk without rotation and {WIDER} k latents, "
                    f"got {sae.activation} and d_sae = {sae.d_sae}"
                )

    def unit(self, variance: Float[Tensor, ""], N: int) -> Float[Tensor, ""]:
        """Factor of the summed error of N tokens with this total variance."""
        if self.error == "fvu":
            return fraction(torch.ones_like(variance), variance)
        return variance.new_full((), 1 / max(N, 1))

    @property
    def plain(self) -> bool:
        """Whether the error is that of a single reconstruction."""
        return not (self.prefixes or self.multi_k)


class TrainingLoss(NamedTuple):
    """A loss, its parts (scalars on the data's device), and the codes."""

    loss: Float[Tensor, ""]
    fvu: Float[Tensor, ""]
    auxk: Float[Tensor, ""]
    penalty: Float[Tensor, ""]
    l0: Float[Tensor, ""]
    codes: Codes
    fired: Bool[Tensor, " d_sae"] | None = None
    """codes.fired(), of a training step."""


def training_loss(
    sae: SAE,
    x: Float[Tensor, "... d_in"],
    dead: Int[Tensor, " n_dead"] | None = None,
    objective: Objective | None = None,
    target: Float[Tensor, "... d_out"] | None = None,
    progress: float = 1.0,
) -> TrainingLoss:
    """The loss of one batch; `.loss` is differentiable in every parameter.

    Args:
        sae: Nothing in it changes. A training loop of your own calls
            `sae.activation.after_step(codes)` after each step, which adapts what is no parameter.
        x: Activations; leading dimensions are flattened.
        dead: Latents that count as dead, ascending.
        objective: The terms and their weights.
        target: Activations to reconstruct, for transcoders and only for them.
        progress: Fraction of training that is done, for coefficients that change with it.

    Raises ValueError if the objective or the target does not fit the SAE.
    """
    objective = objective or Objective()
    objective.check(sae)
    x, y = tokens_and_target(sae, x, target)
    variance = total_variance(y)
    unit = objective.unit(variance, len(y))
    weights, centered, left = sae.weights(), sae.center(x), y - sae.skip(x)
    extra, penalty = 0.0, y.new_zeros(())
    if sae.activation.decodes:
        recon, codes = sae.activation.reconstruct(centered, weights)
    else:
        if objective.multi_k:
            codes, extra = wider_codes(sae, centered, left, weights)
        else:
            codes, penalty = sae.activation.penalized(centered, left, weights, progress)
        recon = weights.decode(codes)
    residual = left - recon
    error = own = residual.square().sum()
    if objective.prefixes:
        error = nested_error(codes, left, weights, objective.prefixes, own)
    loss = unit * (error + extra + len(x) * penalty)
    auxk = torch.zeros_like(loss)
    if dead is not None and len(dead) and objective.auxk_coef:
        rows = *(weight[dead] for weight in weights[:3]), sae.b_dec if sae.d_out is None else None
        seen = centered.detach(), residual.detach(), objective, sae.activation.signed
        weighted, auxk = AuxK.apply(*rows, *seen)
        loss = loss + weighted
    parts = fraction(own.detach(), variance), auxk, penalty.detach(), codes.l0()
    return TrainingLoss(loss, *parts, codes)


def tokens_and_target(sae: SAE, x: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tokens [N, d_in] and their targets [N, d_out]; ValueError if they do not fit."""
    if (target is None) != (sae.d_out is None):
        raise ValueError("transcoders require `target`; autoencoders must not be given one")
    tokens, shape = sae.tokens(x), [*x.shape[:-1], sae.d_out]
    if target is None:
        return tokens, tokens
    if list(target.shape) != shape:
        raise ValueError(f"target must be of shape {shape}, got {list(target.shape)}")
    return tokens, target.reshape(len(tokens), -1).to(tokens.dtype)


def total_variance(x: Float[Tensor, "N d_in"]) -> Float[Tensor, ""]:
    """Summed squared distance of the rows from their mean: the denominator of FVU. Equal rows have
    none, whatever their mean is rounded to."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = wide.mean(0)
    return nonzero_variance((wide - mean).square().sum(), mean, len(x)).to(x.dtype)


def fraction(part: Float[Tensor, ""], variance: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """part / variance, and 0 of a batch without variance: it does not train the reconstruction."""
    return torch.where(variance == 0, 0.0, part / variance)


def wider_codes(
    sae: SAE, centered: Tensor, target: Tensor, weights: Weights
) -> tuple[Codes, Float[Tensor, ""]]:
    """The codes with k latents, and the weighted error with 4 k, from one selection."""
    assert isinstance(sae.activation, TopK)
    k = sae.activation.cfg.k
    wide = sae.activation.encode(centered, weights, k=WIDER * k)
    codes = Codes(wide.values[:, :k], wide.latents()[:, :k], wide.d_sae)
    return codes, WIDER_COEF * (target - weights.decode(wide)).square().sum()


def nested_error(
    codes: Codes,
    target: Float[Tensor, "N d_out"],
    weights: Weights,
    prefixes: tuple[int, ...],
    own: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Mean error over the prefixes and the whole dictionary, whose error is `own`."""
    sizes = [size for size in prefixes if size < codes.d_sae]
    errors = [(target - weights.decode(codes.below(size))).square().sum() for size in sizes]
    return torch.stack([*errors, own]).mean()


def default_k_aux(d_out: int) -> int:
    """Half the width of the data: enough to reconstruct, few enough to stay sparse."""
    return max(d_out // 2, 1)


class AuxKGradients(NamedTuple):
    """The aux loss, its weight, and the weighted gradients of the dead latents' parameters."""

    loss: Float[Tensor, ""]
    weight: float
    """Smaller while there are fewer than k_aux dead latents."""
    W_enc: Float[Tensor, "n_dead d_in"]
    b_enc: Float[Tensor, " n_dead"]
    W_dec: Float[Tensor, "n_dead d_out"]
    b_dec: Float[Tensor, " d_in"]
    """Of what was subtracted from the tokens."""


def auxk_gradients(
    centered: Float[Tensor, "N d_in"],
    residual: Float[Tensor, "N d_out"],
    slices: tuple[Tensor, Tensor, Tensor],
    objective: Objective,
    signed: bool,
) -> AuxKGradients:
    """Differentiate the aux loss on the dead rows of W_enc, b_enc and W_dec, in chunks of tokens.

    Matmuls are in the slices' dtype, sums in that of the residual.
    """
    if torch.is_inference_mode_enabled():  # its tensors can have no gradient, copies of them can
        with torch.inference_mode(False):
            c, r, *copies = (t.clone() for t in (centered, residual, *slices))
            return auxk_gradients(c, r, (copies[0], copies[1], copies[2]), objective, signed)
    W_enc, b_enc, W_dec = leaves = [t.detach().requires_grad_() for t in slices]
    n_dead, k_aux = len(W_enc), objective.k_aux or default_k_aux(residual.shape[1])
    sums = [torch.zeros_like(leaf, dtype=residual.dtype) for leaf in leaves]
    loss, d_b_dec = residual.new_zeros(()), residual.new_zeros(centered.shape[1])
    scale = residual.new_full((), 1 / max(len(residual), 1))
    if objective.auxk_error == "relative":
        scale = fraction(torch.ones_like(scale), total_variance(residual))
    weight = objective.auxk_coef * min(n_dead / k_aux, 1.0)
    budget = AUX_BYTES if residual.device.type == "cpu" else buffer_bytes(residual.device)
    chunk = max(1, budget // (n_dead * residual.itemsize))
    for c, r in zip(centered.split(chunk), residual.split(chunk), strict=True):
        with torch.enable_grad():
            c = c.detach().requires_grad_()
            part = auxk_error(c, r, W_enc, b_enc, W_dec, k_aux, signed) * scale
        *gradients, d_centered = torch.autograd.grad(part, [*leaves, c])
        loss += part.detach()
        d_b_dec.sub_(d_centered.sum(0, dtype=residual.dtype), alpha=weight)
        for total, gradient in zip(sums, gradients, strict=True):
            total.add_(gradient, alpha=weight)
    d_W_enc, d_b_enc, d_W_dec = sums
    return AuxKGradients(loss, weight, d_W_enc, d_b_enc, d_W_dec, d_b_dec)


class AuxK(torch.autograd.Function):
    """`auxk_gradients` for autograd: the weighted loss, and the loss. b_dec is what was subtracted
    from the tokens, or None."""

    @staticmethod
    def forward(ctx, W_enc, b_enc, W_dec, b_dec, centered, residual, objective, signed):
        found = auxk_gradients(centered, residual, (W_enc, b_enc, W_dec), objective, signed)
        ctx.save_for_backward(*found[2:])
        ctx.mark_non_differentiable(found.loss)
        return found.weight * found.loss, found.loss

    @staticmethod
    @once_differentiable
    def backward(ctx, g, _):
        needed = zip(ctx.saved_tensors, ctx.needs_input_grad[:4], strict=True)
        return *(g * t if need else None for t, need in needed), None, None, None, None


def auxk_error(
    centered: Float[Tensor, "N d_in"],
    residual: Float[Tensor, "N d_out"],
    W_enc: Float[Tensor, "n_dead d_in"],
    b_enc: Float[Tensor, " n_dead"],
    W_dec: Float[Tensor, "n_dead d_out"],
    k_aux: int,
    signed: bool,
) -> Float[Tensor, ""]:
    """Summed squared error of the k_aux best dead latents of each token on the residual.

    Dense matmuls on the dead rows: with k_aux near d_out / 2, gathers would cost more.
    """
    pre = linear(centered, W_enc, b_enc)
    if k_aux < pre.shape[1]:
        best = topk_indices(pre, k_aux, "abs" if signed else "value")
        kept = torch.zeros_like(pre, dtype=torch.bool).scatter_(1, best, True)
        pre = pre.where(kept, 0.0)
    codes = pre if signed else pre.relu()
    return (codes @ W_dec - residual).square().sum()
