"""What training minimises: the unexplained variance, the activation's price, dead latents' task.

    error    = sum |y - recon|^2                                     y = x, or a transcoder's target
    FVU      = error / sum |y - mean(y)|^2                           over the batch of N tokens
    residual = y - recon, held constant
    aux      = sum |aux codes W_dec - residual|^2 / sum |residual - mean(residual)|^2
    loss     = FVU + N penalty / sum |y - mean(y)|^2 + auxk_coef * min(n_dead / k_aux, 1) * aux

With layer_norm, x stands for the normalised tokens. The penalty is the activation's own, per token,
so that its coefficient weighs it against a token's squared error, as papers do. With nested
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
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from fastsae.codes import Codes
from fastsae.config import check_choices
from fastsae.nn import SAE, TopK
from fastsae.nn.activation import Pass, Weights
from fastsae_kernels._launch import buffer_bytes
from fastsae_kernels.topk import topk_indices

Error = Literal["fvu", "sse"]
AuxError = Literal["relative", "absolute"]

AUX_BYTES = 64 << 20
"""Pre-activations of dead latents that exist at a time, on a CPU."""

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
        """ValueError unless the SAE can be trained so."""
        if self.prefixes and self.prefixes[-1] > sae.d_sae:
            raise ValueError(f"prefixes must be at most d_sae = {sae.d_sae}, got {self.prefixes}")
        if self.prefixes == (sae.d_sae,):
            raise ValueError(
                f"prefixes {self.prefixes} have no effect: all latents count always, name fewer"
            )
        if self.prefixes and getattr(sae.activation.cfg, "rotation", None) == "dense":
            raise ValueError('rotation "dense" is of one reconstruction: prefixes need "support"')
        if self.multi_k:
            top_k = isinstance(sae.activation, TopK) and sae.activation.fuses
            if not top_k or sae.activation.cfg.k * WIDER > sae.d_sae:
                raise ValueError(
                    f"multi_k needs topk without rotation and {WIDER} k latents, "
                    f"got {sae.activation} and d_sae = {sae.d_sae}"
                )

    @property
    def plain(self) -> bool:
        """Whether it is one error of one reconstruction."""
        return not (self.prefixes or self.multi_k)


class TrainingLoss(NamedTuple):
    """A loss, what it is made of (scalars on the data's device), and the codes it saw."""

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

    `dead` lists, in rising order, latents that have not fired for long. `target` is a transcoder's.
    `progress` is the part of training that is done, for coefficients that rise or fall with it.
    Leading dimensions are flattened. ValueError for an objective that does not fit the SAE, and
    unless there is a target if, and only if, it is a transcoder.
    """
    objective = objective or Objective()
    objective.check(sae)
    x, y = both_ends(sae, x, target)
    N = max(len(y), 1)
    unit = 1 / total_variance(y) if objective.error == "fvu" else y.new_full((), 1 / N)
    weights, centred, left = sae.weights(), sae.centre(x), y - sae.skip(x)
    if objective.multi_k:
        result, extra = wider_pass(sae, centred, left, weights)
    else:
        result = sae.activation.training_pass(centred, left, weights, progress)
        extra = 0.0
    residual = left - result.recon
    error = own = residual.square().sum()
    if objective.prefixes:
        error = nested_error(result.codes, left, weights, objective.prefixes, own)
    loss = unit * (error + extra + len(x) * result.penalty)
    auxk = torch.zeros_like(loss)
    if dead is not None and len(dead) and objective.auxk_coef:
        k_aux = objective.k_aux or default_k_aux(y.shape[1])
        auxk = auxk_loss(sae, centred, residual.detach(), weights, dead, objective, k_aux)
        loss = loss + auxk_weight(objective.auxk_coef, len(dead), k_aux) * auxk
    fvu = own.detach() / total_variance(y) if objective.error == "sse" else unit * own.detach()
    codes = result.codes
    parts = fvu, auxk.detach(), result.penalty.detach(), codes.l0()
    return TrainingLoss(loss, *parts, codes)


def both_ends(sae: SAE, x: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tokens [N, d_in] and what is to come out, [N, d_out]; ValueError if they do not fit."""
    if (target is None) != (sae.d_out is None):
        raise ValueError("a transcoder needs a target, and an autoencoder takes none")
    tokens, shape = sae.tokens(x), [*x.shape[:-1], sae.d_out]
    if target is None:
        return tokens, tokens
    if list(target.shape) != shape:
        raise ValueError(f"target must be of shape {shape}, got {list(target.shape)}")
    return tokens, target.reshape(len(tokens), -1)


def total_variance(x: Float[Tensor, "N d_in"]) -> Float[Tensor, ""]:
    """Summed squared distance of the rows from their mean: what FVU is a fraction of."""
    return (x - x.mean(0)).square().sum()


def wider_pass(
    sae: SAE, centred: Tensor, target: Tensor, weights: Weights
) -> tuple[Pass, Float[Tensor, ""]]:
    """The pass with k latents, and the weighted error with 4 k, from one selection."""
    assert isinstance(sae.activation, TopK)
    k = sae.activation.cfg.k
    wide = sae.activation.encode(centred, weights.W_enc, weights.b_enc, k=WIDER * k)
    codes = Codes(wide.values[:, :k], wide.indices[:, :k], wide.d_sae)
    recon, wider = (c.decode(weights.W_dec) + weights.b_dec for c in (codes, wide))
    extra = WIDER_COEF * (target - wider).square().sum()
    return Pass(recon, codes, recon.new_zeros(())), extra


def nested_error(
    codes: Codes,
    target: Float[Tensor, "N d_out"],
    weights: Weights,
    prefixes: tuple[int, ...],
    own: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Mean squared error over the prefixes and the whole dictionary, whose own error is known."""
    sizes = [size for size in prefixes if size < codes.d_sae]
    errors = [
        (target - codes.below(size).decode(weights.W_dec) - weights.b_dec).square().sum()
        for size in sizes
    ]
    return torch.stack([*errors, own]).mean()


def default_k_aux(d_out: int) -> int:
    """Half the width of the data: enough to reconstruct, few enough to stay sparse."""
    return max(d_out // 2, 1)


def auxk_weight(auxk_coef: float, n_dead: int, k_aux: int) -> float:
    """The weight of the aux loss, smaller while there are fewer than k_aux dead latents."""
    return auxk_coef * min(n_dead / k_aux, 1.0)


def auxk_tokens(x: Float[Tensor, "N d_in"], n_dead: int) -> int:
    """How many tokens' pre-activations of dead latents exist at a time."""
    budget = AUX_BYTES if x.device.type == "cpu" else buffer_bytes(x.device)
    return max(1, budget // (n_dead * x.itemsize))


def auxk_scale(residual: Float[Tensor, "N d_out"], objective: Objective) -> Float[Tensor, ""]:
    """What the summed error of the aux codes is multiplied by."""
    if objective.auxk_error == "absolute":
        return residual.new_full((), 1 / max(len(residual), 1))
    return 1 / total_variance(residual)


def auxk_loss(
    sae: SAE,
    centred: Float[Tensor, "N d_in"],
    residual: Float[Tensor, "N d_out"],
    weights: Weights,
    dead: Int[Tensor, " n_dead"],
    objective: Objective,
    k_aux: int,
) -> Float[Tensor, ""]:
    """The error that dead latents leave of the residual."""
    W_enc, b_enc, W_dec = (weight[dead] for weight in weights[:3])
    signed, chunk = sae.activation.signed, auxk_tokens(centred, len(dead))
    error = residual.new_zeros(())
    for c, r in zip(centred.split(chunk), residual.split(chunk), strict=True):
        arguments = c, r, W_enc, b_enc, W_dec, k_aux, signed
        # Done again when it is differentiated, so that one chunk's pre-activations are kept.
        error = error + checkpoint(auxk_error, *arguments, use_reentrant=False)
    return error * auxk_scale(residual, objective)


def auxk_error(
    centred: Float[Tensor, "N d_in"],
    residual: Float[Tensor, "N d_out"],
    W_enc: Float[Tensor, "n_dead d_in"],
    b_enc: Float[Tensor, " n_dead"],
    W_dec: Float[Tensor, "n_dead d_out"],
    k_aux: int,
    signed: bool,
) -> Float[Tensor, ""]:
    """Summed squared error of the k_aux best dead latents of each token on the residual.

    Dense products on the slice of dead rows: with k_aux near d_out / 2, gathers would cost more.
    """
    pre = linear(centred, W_enc, b_enc)
    if k_aux < pre.shape[1]:
        best = topk_indices(pre, k_aux, "abs" if signed else "value")
        kept = torch.zeros_like(pre, dtype=torch.bool).scatter_(1, best, True)
        pre = pre.where(kept, 0.0)
    codes = pre if signed else pre.relu()
    return (codes @ W_dec - residual).square().sum()
