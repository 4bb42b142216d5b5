"""One training step, through autograd or fused, with the same mathematics.

    fused:  encode -> decode, error, value gradients -> per latent: both weight gradients,
            constraint, Adam, constraint again

The fused step builds no graph and no [d_sae, d_in] gradient: each row's gradient is summed and
applied at once. It supports activations whose gradient is the identity on active entries (TopK,
AbsTopK and BatchTopK, straight-through) and the error of a single reconstruction; everything else
goes through autograd. With TopK, neither synchronizes with a GPU.
"""

from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastsae.codes import Codes
from fastsae.losses import Objective, TrainingLoss, auxk_gradients, fraction, training_loss
from fastsae.nn import SAE, TopKConfig
from fastsae.nn.activation import Weights
from fastsae_kernels import RowGradients, Shadow, candidates, center, latent_major

from .optim import Adam

AUDITED = 64
"""Tokens of a logged step whose low-precision candidates are compared with exact codes."""


def autograd_step(
    sae: SAE,
    adam: Adam,
    x: Float[Tensor, "N d_in"],
    dead: Int[Tensor, " n_dead"] | None,
    objective: Objective,
    target: Float[Tensor, "N d_out"] | None = None,
    progress: float = 1.0,
    downstream: tuple[float, Float[Tensor, ""]] | None = None,
) -> TrainingLoss:
    """Differentiate `training_loss`, then constrain and update.

    `downstream` is a coefficient and a further term of the loss (see end_to_end.py).
    """
    result = training_loss(sae, x, dead, objective, target, progress)
    if downstream is not None:
        coef, term = downstream
        result = result._replace(loss=result.loss + coef * term, downstream=term.detach())
    names, parameters = zip(*sae.named_parameters(), strict=True)
    gradients = torch.autograd.grad(
        result.loss, parameters, allow_unused=True, materialize_grads=True
    )
    with torch.no_grad():
        adam.update_all(dict(zip(names, gradients, strict=True)))
        adam.end_step()
        sae.activation.after_step(result.codes)
    return result._replace(loss=result.loss.detach(), fired=result.codes.fired())


@torch.no_grad()
def fused_step(
    sae: SAE,
    adam: Adam,
    x: Float[Tensor, "N d_in"],
    dead: Int[Tensor, " n_dead"] | None,
    objective: Objective,
    codes: Codes | None = None,
) -> TrainingLoss:
    """The same update without a graph, with matmuls on the low-precision copies that adam keeps.

    `codes` are those of x, if they are already known.
    """
    x, shards = sae.tokens(x), sae.shards
    operands, shadow = operands_of(sae, adam)
    W_enc, b_enc, W_dec, *_ = operands
    seen, variance = center(x, sae.b_dec, W_enc.dtype)
    if codes is None:
        proposals = {} if shadow is None else {"shadow": shadow}  # only TopK.encode takes one
        codes = sae.activation.encode(shards.own_tokens(seen), operands, **proposals)
    sse, error, dots = shards.squared_error(codes, W_dec, sae.b_dec, shards.own_tokens(x))
    values, indices, dots = shards.gather_entries(codes.values, codes.latents(), dots)
    codes = codes._replace(values=values, indices=indices)
    total = sse.sum()
    loss = objective.value(total, variance, len(x))
    unit = objective.unit(total, variance, len(x))
    fvu, auxk = fraction(total, variance), torch.zeros_like(total)
    aux = extra = None
    if dead is not None and objective.auxk_coef and any(shards.counts(len(dead))):
        slices = W_enc[dead], b_enc[dead], W_dec[dead]
        settings = objective, sae.activation.signed, objective.proportion(total, variance), shards
        aux = auxk_gradients(seen, -error.to(x.dtype), slices, *settings)
        auxk, extra = aux.loss, (dead, aux.W_dec, aux.W_enc)

    scale = 2 * unit
    runs = latent_major(indices, codes.d_sae, codes.active)
    entries = torch.stack((codes.values.to(x.dtype), dots)).flatten(1)
    weights, d_weights = entries.mul_(scale)[:, runs.entry]
    d_b_enc, d_center = adam.update_rows(RowGradients(runs, weights, error, d_weights, seen, extra))
    d_b_dec = scale * error.sum(0, dtype=x.dtype) - shards.total(d_center)
    if aux is not None:
        loss = loss + aux.weight * aux.loss
        d_b_enc[dead] += aux.b_enc
        d_b_dec += aux.b_dec
    adam.update("b_enc", d_b_enc)
    adam.update("b_dec", d_b_dec)
    adam.end_step()
    sae.activation.after_step(codes)
    l0 = shards.total(runs.start[-1]) / max(len(x), 1)  # codes.l0(), without counting again
    fired = runs.start[1:] > runs.start[:-1]
    return TrainingLoss(loss, fvu, auxk, torch.zeros_like(fvu), l0, codes, fired)


def operands_of(sae: SAE, adam: Adam) -> tuple[Weights, Shadow | None]:
    """The weights that the fused step multiplies with, and the copy of W_enc, if any, that only
    finds candidates."""
    low = "W_dec" in adam.shadow  # then all matmuls are in bfloat16
    W_enc, W_dec = ((adam.shadow if low else adam.parameters)[name] for name in ("W_enc", "W_dec"))
    return Weights(W_enc, sae.b_enc.to(W_enc.dtype), W_dec, sae.b_dec, sae.shards), adam.quantized


@torch.no_grad()
def candidate_recall(sae: SAE, adam: Adam, x: Float[Tensor, "N d_in"]) -> dict[str, float]:
    """For a line of the log: the share of the active entries of the first AUDITED tokens that are
    among the low-precision candidates. Empty if the step uses none, or in several processes."""
    operands, shadow = operands_of(sae, adam)
    if shadow is None or sae.shards.size > 1:
        return {}
    W_enc, b_enc, *_ = operands
    seen, _ = center(sae.tokens(x[:AUDITED]), sae.b_dec, W_enc.dtype)
    codes = sae.activation.encode(seen, operands)
    cfg = cast(TopKConfig, sae.activation.cfg)  # no other activation has candidates
    found = candidates(seen, shadow, b_enc, cfg.k, cfg.by)
    kept = (codes.latents()[:, :, None] == found[:, None, :]).any(2)[codes.values != 0]
    return {"candidate_recall": kept.float().mean().item()} if kept.numel() else {}
