"""Rank each token's candidate latents by their exact pre-activations, and keep the k largest.

    h[n, c] = x[n] . W[candidates[n, c]] + b[candidates[n, c]],  by sums in fp32
    rescore(x, W, b, candidates, k)            max(h, 0) at the k largest h of each token
    rescore(x, W, b, candidates, k, by="abs")  h at the k largest |h|

Shapes: N tokens, C candidates per token, K kept, F latents, D model width.
"""

import torch
from torch import Tensor

from ._launch import use_triton, wide_dtype
from .sparse import gather_dot
from .topk import By, activated, topk_indices, topk_reference

# --- reference: the specification -----------------------------------------------------------


def rescore_reference(
    x: Tensor, W: Tensor, b: Tensor, candidates: Tensor, k: int, by: By = "value"
) -> tuple[Tensor, Tensor]:
    """[N, D], [F, D], [F], [N, C] -> [N, K], [N, K]"""
    latents, wide = candidates.sort(dim=1).values, wide_dtype(x)
    h = torch.einsum("nd,ncd->nc", x.to(wide), W[latents].to(wide)) + b[latents]
    values, place = topk_reference(h, k, by)
    return values.to(x.dtype), latents.gather(1, place)


# --- torch path: what runs without a GPU ----------------------------------------------------


def ranked(
    x: Tensor, W: Tensor, b: Tensor, candidates: Tensor, k: int, by: By
) -> tuple[Tensor, Tensor]:
    """The k largest pre-activations among the candidates, in fp32 (fp64 for fp64), and their
    latents: [N, K], [N, K], in the order of topk."""
    latents = candidates.sort(dim=1).values  # so that ties go to the lowest latent
    h = gather_dot(x.to(wide_dtype(x)), latents, W) + b[latents]
    place = topk_indices(h, k, by)
    return h.gather(1, place), latents.gather(1, place)


def _rescore_torch(
    x: Tensor, W: Tensor, b: Tensor, candidates: Tensor, k: int, by: By
) -> tuple[Tensor, Tensor]:
    h, latents = ranked(x, W, b, candidates, k, by)
    return activated(h, by).to(x.dtype), latents


# --- public ---------------------------------------------------------------------------------


def rescore(
    x: Tensor, W: Tensor, b: Tensor, candidates: Tensor, k: int, by: By = "value"
) -> tuple[Tensor, Tensor]:
    """Rank candidates [N, C], distinct latents for each token, and keep the k largest.

    x [N, D], W [F, D], b [F] -> values and indices [N, K] as of topk: largest first, ties to the
    lowest latent, NaN before any number. Values are ranked in fp32 and then rounded to x's dtype.
    Not differentiable. Reads N C D elements of W. encode_topk, its caller, checks the arguments.
    """
    if use_triton(x) and x.dtype != torch.float64:
        from ._rescore_kernel import launch_rescore as run
    else:
        run = _rescore_torch
    return run(x.contiguous(), W.contiguous(), b, candidates, k, by)
