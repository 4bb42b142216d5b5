"""The training loss of a batch."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastsae.codes import Codes
from fastsae.nn import SAE, TopK
from fastsae.nn.activation import Weights

from .auxk import AuxK
from .objective import WIDER, Objective
from .variance import fraction, total_variance

WIDER_COEF = 1 / 8  # arXiv:2406.04093, A.6


class TrainingLoss(NamedTuple):
    """A loss, its parts (scalars on the data's device), and the codes.

    auxk and penalty are as they are before they are weighted and, with log_fvu, divided by FVU.
    """

    loss: Float[Tensor, ""]
    fvu: Float[Tensor, ""]
    auxk: Float[Tensor, ""]
    penalty: Float[Tensor, ""]
    l0: Float[Tensor, ""]
    codes: Codes
    fired: Bool[Tensor, " d_sae"] | None = None
    """codes.fired(), of a training step."""
    downstream: Float[Tensor, ""] | None = None
    """The change of the model's predictions, without its coefficient, of a step that trains on it.
    """


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
    error = error + extra
    unit = objective.unit(error.detach(), variance, len(y))
    loss = objective.value(error, variance, len(y)) + unit * len(y) * penalty
    auxk = torch.zeros_like(loss)
    if dead is not None and objective.auxk_coef and any(sae.shards.counts(len(dead))):
        rows = *(weight[dead] for weight in weights[:3]), sae.b_dec if sae.d_out is None else None
        proportion = objective.proportion(error.detach(), variance)
        settings = objective, sae.activation.signed, proportion, sae.shards
        weighted, auxk = AuxK.apply(*rows, centered.detach(), residual.detach(), *settings)
        loss = loss + weighted
    parts = fraction(own.detach(), variance), auxk, penalty.detach(), sae.shards.l0(codes)
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


def wider_codes(
    sae: SAE, centered: Tensor, target: Tensor, weights: Weights
) -> tuple[Codes, Float[Tensor, ""]]:
    """The codes with k latents, and the weighted error with 4 k, from one selection."""
    assert isinstance(sae.activation, TopK)
    k, by = sae.activation.cfg.k, sae.activation.cfg.by
    wide = sae.activation.encode(centered, weights, k=WIDER * k)
    codes = Codes(wide.values[:, :k], wide.latents()[:, :k], wide.d_sae)
    codes = sae.shards.keep_best(codes, k, by, widest=k)
    return codes, WIDER_COEF * (target - weights.decode(wide)).square().sum()


def nested_error(
    codes: Codes,
    target: Float[Tensor, "N d_out"],
    weights: Weights,
    prefixes: tuple[int, ...],
    own: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Mean error over the prefixes and the whole dictionary, whose error is `own`."""
    shards = weights.shards
    sizes = [size for size in prefixes if size < codes.d_sae * shards.latent]
    nested = [codes.below(shards.below(size, codes.d_sae)) for size in sizes]
    errors = [(target - weights.decode(part)).square().sum() for part in nested]
    return torch.stack([*errors, own]).mean()
