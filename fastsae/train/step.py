"""One training step, two ways: through autograd, and fused, with the same mathematics.

    fused:  encode -> decode, error, value gradients -> per block of latents: both weight
            gradients, constraint, Adam, constraint again

The fused step builds no graph and no [d_sae, d_in] gradient: a block of rows is summed, applied
and forgotten while it is in the cache. It serves activations whose gradient is the identity on
active entries (TopK and AbsTopK); every other way of training goes through autograd.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastsae.losses import TrainingLoss, auxk_error, auxk_weight, total_variance, training_loss
from fastsae.nn import SAE
from fastsae_kernels import decode, gather_dot
from fastsae_kernels.sparse import latent_major, sum_runs

from .optim import Adam, normalise_rows_, remove_parallel_

BLOCK_BYTES = 1 << 20
AUX_BYTES = 64 << 20


def autograd_step(
    sae: SAE,
    adam: Adam,
    x: Float[Tensor, "N d_in"],
    dead: Bool[Tensor, " d_sae"] | None,
    auxk_coef: float,
    k_aux: int,
) -> TrainingLoss:
    """Differentiate `training_loss`, then constrain, update and renormalise."""
    result = training_loss(sae, x, dead, auxk_coef, k_aux)
    names, parameters = zip(*sae.named_parameters(), strict=True)
    gradients = dict(zip(names, torch.autograd.grad(result.loss, parameters), strict=True))
    with torch.no_grad():
        remove_parallel_(gradients["W_dec"], sae.W_dec)
        for name, gradient in gradients.items():
            adam.update(name, gradient)
        normalise_rows_(sae.W_dec)
    return result._replace(loss=result.loss.detach())


@torch.no_grad()
def fused_step(
    sae: SAE,
    adam: Adam,
    x: Float[Tensor, "N d_in"],
    dead: Bool[Tensor, " d_sae"] | None,
    auxk_coef: float,
    k_aux: int,
    shadow: Float[Tensor, "d_sae d_in"] | None = None,
) -> TrainingLoss:
    """The same update without a graph; `shadow`, a bf16 copy of W_enc, is kept up to date."""
    centred = x - x.mean(0)
    variance = sum_of_squares(centred)
    torch.sub(x, sae.b_dec, out=centred)
    codes = sae.activation.encode(centred, sae.W_enc, sae.b_enc, shadow)
    values, indices, d_sae = codes
    error = decode(values, indices, sae.W_dec).sub_(centred)
    loss = fvu = sum_of_squares(error) / variance
    rows = torch.empty(0) if dead is None or not auxk_coef else dead.nonzero()[:, 0]
    aux = auxk_gradients(sae, centred, -error, rows, auxk_coef, k_aux) if len(rows) else None

    d_recon = error.mul_(2 / variance)
    d_values = gather_dot(d_recon, indices, sae.W_dec).mul_(codes.active)
    runs = latent_major(indices, d_sae)
    weights, d_weights = values.flatten()[runs.entry], d_values.flatten()[runs.entry]
    d_b_enc = sum_runs(d_weights, x.new_ones(len(x), 1), runs, 0, d_sae)[:, 0]
    d_b_dec = d_recon.sum(0) - d_b_enc @ sae.W_enc
    if aux:
        loss = fvu + auxk_weight(auxk_coef, len(rows), k_aux) * aux.loss
        d_b_enc[aux.rows] += aux.b_enc
        d_b_dec += aux.b_dec
    adam.update("b_enc", d_b_enc)
    adam.update("b_dec", d_b_dec)
    for block in row_blocks(sae.W_dec):
        d_W_dec = sum_runs(weights, d_recon, runs, block.start, block.stop)
        d_W_enc = sum_runs(d_weights, centred, runs, block.start, block.stop)
        if aux:
            aux.add_to_(d_W_enc, d_W_dec, block)
        remove_parallel_(d_W_dec, sae.W_dec[block])
        adam.update("W_dec", d_W_dec, block)
        adam.update("W_enc", d_W_enc, block)
        normalise_rows_(sae.W_dec[block])
        if shadow is not None:
            shadow[block].copy_(sae.W_enc[block])
    return TrainingLoss(loss, fvu, aux.loss if aux else torch.zeros_like(fvu), codes.l0(), codes)


def sum_of_squares(x: Float[Tensor, "N D"]) -> Float[Tensor, ""]:
    """Over all entries, without a copy of x; the norm of a whole tensor loses four digits."""
    return torch.linalg.vector_norm(x, dim=1).square().sum()


def row_blocks(W: Float[Tensor, "d_sae d_in"]) -> Iterator[slice]:
    """Blocks of rows that, with their gradients and moments, stay in a CPU's cache."""
    rows = max(1, BLOCK_BYTES // (W.shape[1] * W.itemsize)) if W.device.type == "cpu" else len(W)
    for start in range(0, len(W), rows):
        yield slice(start, min(start + rows, len(W)))


class AuxKGradients(NamedTuple):
    """The aux loss and its weighted gradients on the dead rows."""

    rows: Int[Tensor, " n_dead"]
    loss: Float[Tensor, ""]
    W_enc: Float[Tensor, "n_dead d_in"]
    b_enc: Float[Tensor, " n_dead"]
    W_dec: Float[Tensor, "n_dead d_in"]
    b_dec: Float[Tensor, " d_in"]

    def add_to_(self, d_W_enc: Tensor, d_W_dec: Tensor, block: slice) -> None:
        """Add what falls into a block of rows to the gradients of that block."""
        first, last = torch.searchsorted(
            self.rows, torch.tensor([block.start, block.stop], device=self.rows.device)
        ).tolist()
        local = self.rows[first:last] - block.start
        d_W_enc.index_add_(0, local, self.W_enc[first:last])
        d_W_dec.index_add_(0, local, self.W_dec[first:last])


def auxk_gradients(
    sae: SAE,
    centred: Float[Tensor, "N d_in"],
    residual: Float[Tensor, "N d_in"],
    rows: Int[Tensor, " n_dead"],
    auxk_coef: float,
    k_aux: int,
) -> AuxKGradients:
    """Differentiate the aux loss on the slice of dead rows, a chunk of tokens at a time."""
    leaves = W_enc, b_enc, W_dec = [
        W[rows].requires_grad_() for W in (sae.W_enc, sae.b_enc, sae.W_dec)
    ]
    d_W_enc, d_b_enc, d_W_dec = sums = [torch.zeros_like(leaf) for leaf in leaves]
    loss, d_b_dec = residual.new_zeros(()), torch.zeros_like(sae.b_dec)
    variance = total_variance(residual)
    weight = auxk_weight(auxk_coef, len(rows), k_aux)
    chunk = max(1, AUX_BYTES // (len(rows) * residual.itemsize))
    for c, r in zip(centred.split(chunk), residual.split(chunk), strict=True):
        with torch.enable_grad():
            c = c.detach().requires_grad_()
            part = auxk_error(c, r, W_enc, b_enc, W_dec, k_aux, sae.activation.signed) / variance
        *gradients, d_centred = torch.autograd.grad(part, [*leaves, c])
        loss += part.detach()
        d_b_dec.sub_(d_centred.sum(0), alpha=weight)
        for d_leaf, gradient in zip(sums, gradients, strict=True):
            d_leaf.add_(gradient, alpha=weight)
    return AuxKGradients(rows, loss, d_W_enc, d_b_enc, d_W_dec, d_b_dec)
