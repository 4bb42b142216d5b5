"""Linear encoder that keeps pre-activations above a threshold, without storing all of them.

    h = x W_enc^T + b_enc
    encode_above(x, W_enc, b_enc, threshold)            h where h > threshold
    encode_above(x, W_enc, b_enc, threshold, by="abs")  h where |h| > threshold

For activations whose number of active latents varies from token to token. The GEMM runs over chunks
of tokens as in encode.py. Each chunk becomes two flat lists (listing.py), of its entries above the
threshold and of their positions. Finally, the lists become rows that are padded to the largest
count of the batch. topk_batch.py selects from the flat lists.
Shapes: N tokens, F latents, D model width, K the largest count, M entries in all.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from ._launch import check_devices, wide_dtype
from ._op import register
from .encode import check_encoder, straight_through
from .listing import Listing
from .topk import By, _rank


class Ragged(NamedTuple):
    """Rows of different lengths, padded with zeros to the longest."""

    values: Tensor  # [N, K]
    indices: Tensor  # [N, K] int64
    count: Tensor  # [N] int64

    @property
    def listed(self) -> Tensor:
        """Mask of entries, as opposed to padding: [N, K]"""
        K = self.indices.shape[1]
        return torch.arange(K, device=self.count.device) < self.count[:, None]


# --- reference: the specification -----------------------------------------------------------


def listed_reference(h: Tensor, chosen: Tensor) -> Ragged:
    """The chosen entries of each row, in latent order: [N, F] twice -> [N, K], [N, K], [N]"""
    count = chosen.sum(1)
    K = max([1, *count.tolist()])
    listed = torch.arange(K, device=h.device) < count[:, None]
    indices = (~chosen).sort(dim=1, stable=True).indices[:, :K].where(listed, 0)
    return Ragged(h.gather(1, indices).where(listed, 0.0), indices, count)


def encode_above_reference(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor | float, by: By = "value"
) -> Ragged:
    """[N, D], [F, D], [F], [F] -> [N, K], [N, K], [N]"""
    h = linear(x, W_enc, b_enc)
    wide = wide_dtype(h)
    threshold = torch.as_tensor(threshold, dtype=wide, device=h.device)
    return listed_reference(h, _rank(h, by).to(wide) > threshold)


# --- rows -----------------------------------------------------------------------------------


def in_rows(values: Tensor, position: Tensor, N: int, F: int) -> Ragged:
    """Pad flat lists to rows of the largest count; reading it waits for the GPU.

    values [M], position [M] -> [N, K], [N, K], [N]
    """
    ends = torch.arange(N + 1, device=position.device) * F
    count = torch.searchsorted(position, ends).diff()
    K = max(int(count.max()), 1) if N else 1
    rows = Ragged(values.new_zeros(N, K), position.new_zeros(N, K), count)
    rows.values.masked_scatter_(rows.listed, values)
    rows.indices.masked_scatter_(rows.listed, position % F)
    return rows


# --- autograd -------------------------------------------------------------------------------


class RaggedEncoder(torch.autograd.Function):
    """Autograd of an encoder that returns Ragged rows; subclasses define forward(x, W, b, ...)."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, indices, count = output
        ctx.save_for_backward(*inputs[:2], indices, count)
        ctx.mark_non_differentiable(indices, count)

    @staticmethod
    def backward(ctx, g, *_):  # g: [N, K]
        x, W_enc, indices, count = ctx.saved_tensors
        # Padding gets no gradient; a listed entry does, even if its value is 0.
        g = g.where(Ragged(g, indices, count).listed, 0.0)
        need_x, need_W, need_b, *others = ctx.needs_input_grad
        gradients = straight_through(g, x, W_enc, indices, (need_x, need_W, need_b))
        return *gradients, *(None for _ in others)


class _EncodeAbove(RaggedEncoder):
    @staticmethod
    def forward(
        x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, by: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        lists = [(x.new_empty(0), x.new_empty(0, dtype=torch.int64))]
        for at, list_chunk in Listing(x, W_enc, b_enc, by).chunks():
            values, position = list_chunk(threshold)
            lists.append((values, position.add_(at.start)))
        values, position = (torch.cat(parts) for parts in zip(*lists, strict=True))
        return in_rows(values, position, len(x), len(W_enc))


def fake_rows(x: Tensor) -> Ragged:
    """Fake result of in_rows: the number of columns depends on the data."""
    N, K = x.shape[0], torch.library.get_ctx().new_dynamic_size()
    whole = torch.int64
    return Ragged(x.new_empty(N, K), x.new_empty(N, K, dtype=whole), x.new_empty(N, dtype=whole))


_encode_above = register(_EncodeAbove, lambda x, W_enc, b_enc, threshold, by: fake_rows(x))

# --- public ---------------------------------------------------------------------------------


def encode_above(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor | float, by: By = "value"
) -> Ragged:
    """Encode tokens and keep the pre-activations that exceed their latent's threshold.

    x [N, D] (already centered), W_enc [F, D], b_enc [F], one floating dtype; threshold a number or
    floating of shape [F] or [], compared in float32 (float64 for float64 x) -> pre [N, K] in x's
    dtype, indices [N, K] int64 and count [N] int64. A row lists its entries h > threshold, or
    |h| > threshold for by="abs", as they are and in latent order; K is the largest count, but at
    least 1, and beyond a row's count pre and indices are 0. NaN exceeds nothing. Differentiable
    in x, W_enc and b_enc, twice and more, through every entry that is listed.

    Costs 2 N F D FLOPs and, on a GPU, two reads of the pre-activations, of which no more than
    FASTSAE_BUFFER_MB exist at a time. On a CPU with bfloat16 instructions, the GEMM of float32
    tensors is in bfloat16, and W_enc copied, where it pays (listing.py): the entries are those of
    fp32 sums, values can differ in the last bits. Sizes depend on the number of entries, so the
    host waits for a GPU once per chunk and once for K. ValueError for wrong shapes or dtypes.
    """
    check_encoder(x, W_enc, b_enc, by)
    wide, F = wide_dtype(x), W_enc.shape[0]
    if not isinstance(threshold, Tensor):
        threshold = torch.full((F,), threshold, dtype=wide, device=x.device)
    if threshold.shape not in ((F,), ()) or not threshold.is_floating_point():
        raise ValueError(
            f"threshold must be a number or floating point of shape {[F]} or [], "
            f"got {threshold.dtype} of shape {list(threshold.shape)}"
        )
    check_devices(x=x, threshold=threshold)
    threshold = threshold.detach().to(wide).expand(F).contiguous()
    return Ragged(*_encode_above(x, W_enc, b_enc, threshold, by))
