"""The auxiliary loss that revives dead latents (aux-k), with its gradients."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from fastsae.codes import Codes
from fastsae.shards import ONE_PROCESS, Shards
from fastsae_kernels import buffer_bytes, topk_indices

from .objective import Objective
from .variance import fraction, total_variance

AUX_BYTES = 64 << 20
"""Budget in bytes for pre-activations of dead latents, on a CPU."""


def default_k_aux(d_out: int) -> int:
    """Half the width of the data: enough to reconstruct, few enough to stay sparse."""
    return max(d_out // 2, 1)


class AuxKGradients(NamedTuple):
    """The aux loss, its weight, and the weighted gradients of the dead latents' parameters."""

    loss: Float[Tensor, ""]
    weight: Float[Tensor, ""]
    """auxk_coef, less while there are fewer than k_aux dead latents, times `proportion`."""
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
    proportion: Float[Tensor, ""],
    shards: Shards = ONE_PROCESS,
) -> AuxKGradients:
    """Differentiate the aux loss on the dead rows of W_enc, b_enc and W_dec, in chunks of tokens.

    Matmuls are in the slices' dtype, sums in that of the residual. `proportion` is that of
    `Objective.proportion`. The dead rows are this process's; the loss is that of all, and every
    place on the data axis computes it for all tokens.
    """
    if torch.is_inference_mode_enabled():  # its tensors can have no gradient, copies of them can
        with torch.inference_mode(False):
            c, r, p, *copies = (t.clone() for t in (centered, residual, proportion, *slices))
            slices = copies[0], copies[1], copies[2]
            return auxk_gradients(c, r, slices, objective, signed, p, shards)
    W_enc, b_enc, W_dec = leaves = [t.detach().requires_grad_() for t in slices]
    n_dead, k_aux = shards.counts(len(W_enc)), objective.k_aux or default_k_aux(residual.shape[1])
    sums = [torch.zeros_like(leaf, dtype=residual.dtype) for leaf in leaves]
    loss, d_b_dec = residual.new_zeros(()), residual.new_zeros(centered.shape[1])
    scale = residual.new_full((), 1 / max(len(residual), 1))
    if objective.auxk_error == "relative":
        scale = fraction(torch.ones_like(scale), total_variance(residual))
    weight = objective.auxk_coef * min(sum(n_dead) / k_aux, 1.0) * proportion
    budget = AUX_BYTES if residual.device.type == "cpu" else buffer_bytes(residual.device)
    chunk = min(shards.counts(max(1, budget // (max(n_dead) * residual.itemsize))))
    for c, r in zip(centered.split(chunk), residual.split(chunk), strict=True):
        with torch.enable_grad():
            c = c.detach().requires_grad_()
            error = auxk_error(c, r, (W_enc, b_enc, W_dec), k_aux, signed, shards, n_dead)
            weighted = error * (scale * weight)  # grad_outputs would make torch import sympy
        *gradients, d_centered = torch.autograd.grad(weighted, [*leaves, c])
        loss += error.detach() * scale
        d_b_dec -= d_centered.sum(0, dtype=residual.dtype)
        for total, gradient in zip(sums, gradients, strict=True):
            total += gradient
    d_W_enc, d_b_enc, d_W_dec = sums
    return AuxKGradients(loss, weight, d_W_enc, d_b_enc, d_W_dec, shards.total(d_b_dec))


class AuxK(torch.autograd.Function):
    """`auxk_gradients` for autograd: the weighted loss, and the loss. b_dec is what was subtracted
    from the tokens, or None."""

    @staticmethod
    def forward(ctx, W_enc, b_enc, W_dec, b_dec, centered, residual, *settings):
        found = auxk_gradients(centered, residual, (W_enc, b_enc, W_dec), *settings)
        ctx.save_for_backward(*found[2:])
        ctx.mark_non_differentiable(found.loss)
        return found.weight * found.loss, found.loss

    @staticmethod
    @once_differentiable
    def backward(ctx, g, _):
        needed = zip(ctx.saved_tensors, ctx.needs_input_grad[:4], strict=True)
        return *(g * t if need else None for t, need in needed), *[None] * 6


def auxk_error(
    centered: Float[Tensor, "N d_in"],
    residual: Float[Tensor, "N d_out"],
    slices: tuple[Tensor, Tensor, Tensor],
    k_aux: int,
    signed: bool,
    shards: Shards,
    n_dead: tuple[int, ...],
) -> Float[Tensor, ""]:
    """Summed squared error of the k_aux best dead latents of each token on the residual.

    Dense matmuls on the dead rows: with k_aux near d_out / 2, gathers would cost more. `n_dead` is
    the number of dead rows of each process.
    """
    W_enc, b_enc, W_dec = slices
    pre, by = linear(centered, W_enc, b_enc), "abs" if signed else "value"
    if k_aux < sum(n_dead):
        own = min(k_aux, len(W_enc))
        best = topk_indices(pre, own, by) if own else pre.new_zeros(len(pre), 0, dtype=torch.int64)
        codes = Codes(pre.detach().gather(1, best), best, len(W_enc))
        codes = shards.keep_best(codes, k_aux, by, min(k_aux, max(n_dead)))
        kept = torch.zeros_like(pre, dtype=torch.bool).scatter_(1, codes.latents(), codes.active)
        pre = pre.where(kept, 0.0)
    codes = pre if signed else pre.relu()
    return (shards.total(codes @ W_dec) - residual).square().sum()
