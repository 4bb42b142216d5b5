"""Linear encoder and exact top-k selection, without a tensor of all pre-activations.

    h = x W_enc^T + b_enc
    encode_topk(x, W_enc, b_enc, k)            max(h, 0) at the k largest h        (TopK)
    encode_topk(x, W_enc, b_enc, k, by="abs")  h at the k largest |h|              (AbsTopK)

The product runs over chunks of tokens of at most `FASTSAE_BUFFER_MB`, and each chunk is selected
from while it is warm. The gradients are the sparse products of sparse.py.
Shapes: N tokens, K kept, F latents, D model width.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import linear

from ._launch import buffer_bytes, check_matrix, rows_in_cache
from .sparse import decode, gather_dot, scatter_outer
from .topk import By, Ties, check_choice, topk_indices, topk_reference

# --- reference: the specification -----------------------------------------------------------


def encode_topk_reference(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, by: By = "value"
) -> tuple[Tensor, Tensor]:
    """[N, D], [F, D], [F] -> [N, K], [N, K]"""
    return topk_reference(linear(x, W_enc, b_enc), k, by)


# --- chunks of tokens -----------------------------------------------------------------------


def _chunk_tokens(N: int, F: int, itemsize: int, device: torch.device) -> int:
    """Tokens per chunk: the fewest chunks that fit the budget, of equal size.

    On a CPU chunks are as small as the product at full speed allows, to stay in the cache.
    """
    most = max(1, buffer_bytes(device) // (F * itemsize))
    most = min(most, rows_in_cache(F, itemsize)) if device.type == "cpu" else most
    return -(-N // -(-N // most))


@cache
def _onednn_dtypes() -> tuple[torch.dtype, ...]:
    """What this machine's oneDNN multiplies."""
    if not torch.backends.mkldnn.is_available():
        return ()
    low = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if low else (torch.float32,)


def _product(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """Contiguous [N, D], [F, D], [F] -> [N, F]

    On a CPU by oneDNN, through the operator that torch.compile calls. `linear` takes MKL, which
    adds the bias in a pass of its own and needs 1.1 to 1.3 times as long on AMD Zen 4.
    """
    if x.device.type == "cpu" and x.dtype in _onednn_dtypes():
        return torch.ops.mkldnn._linear_pointwise(x, W, b, "none", [], "")
    return linear(x, W, b)


def _select(
    x: Tensor, W: Tensor, b: Tensor, k: int, by: By, ties: Ties = "lowest"
) -> tuple[Tensor, Tensor]:
    """Pre-activations that k of each row's ranks pick: [N, D], [F, D], [F] -> [N, K], [N, K]."""
    N, F = x.shape[0], W.shape[0]
    values = x.new_empty(N, k)
    indices = torch.empty(N, k, dtype=torch.int64, device=x.device)
    if not N:
        return values, indices
    x, W, b = x.contiguous(), W.contiguous(), b.contiguous()  # oneDNN's operator misreads others
    chunk = _chunk_tokens(N, F, x.element_size(), x.device)
    for start in range(0, N, chunk):
        rows = slice(start, min(start + chunk, N))
        pre = _product(x[rows], W, b)
        indices[rows] = topk_indices(pre, k, by, ties=ties)
        torch.gather(pre, 1, indices[rows], out=values[rows])
    return values, indices


def _select_rescored(
    x: Tensor, W: Tensor, b: Tensor, k: int, by: By, shadow: Tensor
) -> tuple[Tensor, Tensor]:
    """The same from candidates of a product with the shadow, ranked by their exact values."""
    low = shadow.dtype
    spare = min(k + max(8, k // 2), W.shape[0])
    _, candidates = _select(x.to(low), shadow, b.to(low), spare, by, ties="any")
    candidates = candidates.sort(dim=1).values  # so that ties go to the lowest latent
    h = gather_dot(x, candidates, W) + b[candidates]
    place = topk_indices(h, k, by)
    return h.gather(1, place), candidates.gather(1, place)


# --- autograd -------------------------------------------------------------------------------


class _EncodeTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W_enc, b_enc, k, by, shadow):
        if shadow is None:
            values, indices = _select(x, W_enc, b_enc, k, by)
        else:
            values, indices = _select_rescored(x, W_enc, b_enc, k, by, shadow)
        if by == "value":
            values.relu_()
        ctx.save_for_backward(x, W_enc, values, indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    def backward(ctx, g, _):  # g: [N, K]
        x, W_enc, values, indices = ctx.saved_tensors
        need_x, need_W, need_b = ctx.needs_input_grad[:3]
        g = g * (values != 0)  # an inactive entry passes nothing on
        F, ones = W_enc.shape[0], x.new_ones(x.shape[0], 1)
        return (
            decode(g, indices, W_enc) if need_x else None,
            scatter_outer(g, indices, x, F) if need_W else None,
            scatter_outer(g, indices, ones, F)[:, 0] if need_b else None,
            None,
            None,
            None,
        )


# --- public ---------------------------------------------------------------------------------


def encode_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    by: By = "value",
    *,
    shadow: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Encode tokens and keep the k largest pre-activations of each, exactly.

    x [N, D] (already centred), W_enc [F, D], b_enc [F], one floating dtype -> values [N, K] in
    that dtype and indices [N, K] int64, largest first, ties to the lowest latent. by="value" is
    TopK (arXiv:2406.04093; values below 0 become 0), by="abs" AbsTopK (arXiv:2510.00404).
    Differentiable in x, W_enc and b_enc: an entry of value 0 gets no gradient.

    With `shadow`, a bfloat16 copy of W_enc, the product runs in bfloat16 and only proposes
    max(8, k / 2) more candidates than needed; their values are computed again in x's dtype and
    the k largest of those are kept. Exact unless a true member is not among the candidates.

    Costs 2 N F D FLOPs; no more than FASTSAE_BUFFER_MB of pre-activations exist at a time.
    ValueError for wrong shapes or dtypes, or unless 1 <= k <= F.
    """
    check_matrix("x", x)
    check_matrix("W_enc", W_enc, columns=x.shape[1])
    check_choice(k, by, W_enc.shape[0])
    if b_enc.shape != W_enc.shape[:1]:
        raise ValueError(f"b_enc must have shape {[W_enc.shape[0]]}, got {list(b_enc.shape)}")
    if not x.dtype == W_enc.dtype == b_enc.dtype:
        raise ValueError(
            f"x, W_enc and b_enc must have one dtype, got {x.dtype}, {W_enc.dtype}, {b_enc.dtype}"
        )
    if shadow is not None and shadow.shape != W_enc.shape:
        raise ValueError(f"shadow must have the shape of W_enc, got {list(shadow.shape)}")
    return _EncodeTopK.apply(x, W_enc, b_enc, k, by, shadow)
