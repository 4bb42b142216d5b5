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
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from fastsae.codes import Codes
from fastsae.nn import SAE
from fastsae_kernels._launch import buffer_bytes
from fastsae_kernels.topk import topk_indices

AUX_BYTES = 64 << 20
"""Pre-activations of dead latents that exist at a time, on a CPU."""


class TrainingLoss(NamedTuple):
    """A loss, what it is made of (scalars on the data's device), and the codes it saw."""

    loss: Float[Tensor, ""]
    fvu: Float[Tensor, ""]
    auxk: Float[Tensor, ""]
    l0: Float[Tensor, ""]
    codes: Codes


def training_loss(
    sae: SAE,
    x: Float[Tensor, "... d_in"],
    dead: Int[Tensor, " n_dead"] | None = None,
    auxk_coef: float = 1 / 32,
    k_aux: int | None = None,
) -> TrainingLoss:
    """The loss of one batch; `.loss` is differentiable in every parameter.

    `dead` lists, in rising order, latents that have not fired for long; k_aux of them (by default
    d_in / 2) per token reconstruct what the live ones left over. Raises ValueError if k_aux < 1,
    if auxk_coef < 0, or for a transcoder. Leading dimensions of x are flattened.
    """
    k_aux = default_k_aux(sae.d_in) if k_aux is None else k_aux
    if auxk_coef < 0:
        raise ValueError(f"auxk_coef must be at least 0, got {auxk_coef}")
    if k_aux < 1:
        raise ValueError(f"k_aux must be at least 1, got {k_aux}")
    if sae.d_out is not None:
        raise ValueError("training_loss is an autoencoder's; this SAE has d_out, a transcoder's")
    x = x.reshape(-1, sae.d_in)
    recon, codes = sae.reconstruct(x)
    residual = x - recon
    loss = fvu = residual.square().sum() / total_variance(x)
    auxk = torch.zeros_like(fvu)
    if dead is not None and len(dead) and auxk_coef:
        residual = residual.detach()
        W_enc, b_enc, W_dec = sae.W_enc[dead], sae.b_enc[dead], sae.W_dec[dead]
        signed = sae.activation.signed
        chunk = auxk_tokens(x, len(dead))
        error = torch.zeros_like(fvu)
        for c, r in zip(sae.centre(x).split(chunk), residual.split(chunk), strict=True):
            arguments = c, r, W_enc, b_enc, W_dec, k_aux, signed
            # Done again when it is differentiated, so that one chunk's pre-activations are kept.
            error = error + checkpoint(auxk_error, *arguments, use_reentrant=False)
        auxk = error / total_variance(residual)
        loss = fvu + auxk_weight(auxk_coef, len(dead), k_aux) * auxk
    return TrainingLoss(loss, fvu.detach(), auxk.detach(), codes.l0(), codes)


def total_variance(x: Float[Tensor, "N d_in"]) -> Float[Tensor, ""]:
    """Summed squared distance of the rows from their mean: what FVU is a fraction of."""
    return (x - x.mean(0)).square().sum()


def default_k_aux(d_in: int) -> int:
    """Half the width of the data: enough to reconstruct, few enough to stay sparse."""
    return max(d_in // 2, 1)


def auxk_weight(auxk_coef: float, n_dead: int, k_aux: int) -> float:
    """The weight of the aux loss, smaller while there are fewer than k_aux dead latents."""
    return auxk_coef * min(n_dead / k_aux, 1.0)


def auxk_tokens(x: Float[Tensor, "N d_in"], n_dead: int) -> int:
    """How many tokens' pre-activations of dead latents exist at a time."""
    budget = AUX_BYTES if x.device.type == "cpu" else buffer_bytes(x.device)
    return max(1, budget // (n_dead * x.itemsize))


def auxk_error(
    centred: Float[Tensor, "N d_in"],
    residual: Float[Tensor, "N d_in"],
    W_enc: Float[Tensor, "n_dead d_in"],
    b_enc: Float[Tensor, " n_dead"],
    W_dec: Float[Tensor, "n_dead d_in"],
    k_aux: int,
    signed: bool,
) -> Float[Tensor, ""]:
    """Summed squared error of the k_aux best dead latents of each token on the residual.

    Dense products on the slice of dead rows: with k_aux near d_in / 2, gathers would cost more.
    """
    pre = linear(centred, W_enc, b_enc)
    if k_aux < pre.shape[1]:
        best = topk_indices(pre, k_aux, "abs" if signed else "value")
        kept = torch.zeros_like(pre, dtype=torch.bool).scatter_(1, best, True)
        pre = pre.where(kept, 0.0)
    codes = pre if signed else pre.relu()
    return (codes @ W_dec - residual).square().sum()
