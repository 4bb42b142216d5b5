"""What training minimises: the unexplained variance, plus a task for dead latents.

    FVU     = sum |x - recon|^2 / sum |x - mean(x)|^2               over the batch
    residual = x - recon, held constant
    aux     = sum |aux codes W_dec - residual|^2 / sum |residual - mean(residual)|^2
    loss    = FVU + auxk_coef * min(n_dead / k_aux, 1) * aux

The aux codes of a token are its k_aux best-ranked dead latents (Gao et al. 2024,
arXiv:2406.04093, A.2). Their encoder rows are trained as well as their decoder rows.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import linear

from fastsae.nn.sae import SAE


class TrainingLoss(NamedTuple):
    """A loss and what it is made of; each a scalar on the device of the data."""

    loss: Float[Tensor, ""]
    fvu: Float[Tensor, ""]
    auxk: Float[Tensor, ""]
    l0: Float[Tensor, ""]


def training_loss(
    sae: SAE,
    x: Float[Tensor, "N d_in"],
    dead: Bool[Tensor, " d_sae"] | None = None,
    auxk_coef: float = 1 / 32,
    k_aux: int | None = None,
) -> TrainingLoss:
    """The loss of one batch, differentiable in every parameter.

    `dead` marks latents that have not fired for long; k_aux of them (by default d_in / 2) per
    token reconstruct what the live ones left over. Raises ValueError if k_aux < 1.
    """
    codes = sae.encode(x)
    residual = x - sae.decode(codes)
    loss = fvu = residual.square().sum() / total_variance(x)
    auxk = torch.zeros_like(fvu)
    if dead is not None and auxk_coef:
        rows = dead.nonzero()[:, 0]
        if len(rows):
            k_aux = default_k_aux(sae.d_in) if k_aux is None else k_aux
            auxk = auxk_loss(sae, sae.centre(x), residual.detach(), rows, k_aux)
            loss = fvu + auxk_coef * min(len(rows) / k_aux, 1.0) * auxk
    return TrainingLoss(loss, fvu.detach(), auxk.detach(), codes.l0())


def total_variance(x: Float[Tensor, "N d_in"]) -> Float[Tensor, ""]:
    """Summed squared distance of the rows from their mean: what FVU is a fraction of."""
    return (x - x.mean(0)).square().sum()


def default_k_aux(d_in: int) -> int:
    """Half the width of the data: enough to reconstruct, few enough to stay sparse."""
    return max(d_in // 2, 1)


def auxk_loss(
    sae: SAE,
    centred: Float[Tensor, "N d_in"],
    residual: Float[Tensor, "N d_in"],
    dead: Int[Tensor, " n_dead"],
    k_aux: int,
) -> Float[Tensor, ""]:
    """How badly the k_aux best dead latents of each token reconstruct the residual.

    Dense products on the slice of dead rows: with k_aux near d_in / 2, gathers would cost more.
    """
    if k_aux < 1:
        raise ValueError(f"k_aux must be at least 1, got {k_aux}")
    pre = linear(centred, sae.W_enc[dead], sae.b_enc[dead])
    recon = sparsest(pre, min(k_aux, len(dead)), sae.activation.signed) @ sae.W_dec[dead]
    return (recon - residual).square().sum() / total_variance(residual)


def sparsest(pre: Float[Tensor, "N F"], k: int, signed: bool) -> Float[Tensor, "N F"]:
    """Dense codes with all but the k best-ranked entries of each row at 0."""
    if k < pre.shape[1]:
        rank = pre.abs() if signed else pre
        keep = torch.zeros_like(pre, dtype=torch.bool)
        keep.scatter_(1, rank.detach().topk(k, sorted=False).indices, True)
        pre = pre * keep
    return pre if signed else pre.relu()
