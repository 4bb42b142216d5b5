"""The k_total largest pre-activations of a whole batch, exactly (BatchTopK, arXiv:2412.06410).

    topk_batch(pre, k_total)                     max(h, 0) at the k_total largest h of [N, F]
    topk_batch(pre, k_total, by="abs")           h at the k_total largest |h|
    encode_topk_batch(x, W_enc, b_enc, k_total)  the same of h = x W_enc^T + b_enc, row by row

Entries above a guess of the least that is kept are listed, a chunk of tokens at a time. Where the
lists outgrow what is wanted, only the largest stay, and the least of them is the next guess: later
equals lose to earlier ones. If k_total entries were found the guess was right and the k_total
largest are among them; if not, a lower one is tried, and 0 never fails, since entries of value 0
are not active. The first guess comes from the caller or from a few rows of the batch.
Shapes: N tokens, F latents, D model width, K the largest count of a row, M entries of a list.
"""

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from ._launch import check_shape, rows_at_a_time
from ._op import register, register_constant
from .encode import check_encoder
from .encode_above import (
    Ragged,
    RaggedEncoder,
    fake_rows,
    in_rows,
    list_above,
    listed_reference,
    products,
)
from .product import product
from .topk import By, _rank, check_by

# --- references: the specification ----------------------------------------------------------


def _positions_reference(h: Tensor, k_total: int, by: By) -> Tensor:
    """Where the active entries of the flattened h are, in order: [N, F] -> [M], M <= k_total"""
    rank = _rank(h, by).flatten()
    rank = rank.where(rank > 0, 0.0)
    best = rank.sort(descending=True, stable=True).indices[:k_total]
    return best[rank[best] > 0].sort().values


def topk_batch_reference(
    pre: Tensor, k_total: int, by: By = "value"
) -> tuple[Tensor, Tensor, Tensor]:
    """[N, F] -> [k_total], [k_total], [k_total]"""
    position, F = _positions_reference(pre, k_total, by), pre.shape[1]
    results = pre.flatten()[position], position // F, position % F
    values, tokens, latents = (pad(t, (0, k_total - len(position))) for t in results)
    return values, tokens, latents


def encode_topk_batch_reference(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k_total: int, by: By = "value"
) -> Ragged:
    """[N, D], [F, D], [F] -> [N, K], [N, K], [N]"""
    h = linear(x, W_enc, b_enc)
    position = _positions_reference(h, k_total, by)
    chosen = torch.zeros_like(h, dtype=torch.bool).flatten().index_fill(0, position, True)
    return listed_reference(h, chosen.view(h.shape))


# --- the choice -----------------------------------------------------------------------------

Chunks = Iterable[tuple[int, Tensor]]
"""Of pre-activations: the position of the first, then contiguous [n, F]."""

SAMPLE = 64
"""Rows, or up to twice as many, that a guess is made from."""

MARGIN = 1.25
"""How many times k_total entries to expect above it, since rows differ."""


def _guess(rows: Tensor, N: int, k_total: int, by: By) -> float:
    """From some of N rows what about MARGIN k_total entries of all exceed; 0 if too few do."""
    wanted = math.ceil(MARGIN * k_total * len(rows) / N)
    rank = _rank(rows, by).flatten()
    if not 0 < wanted < len(rank):
        return 0.0
    rank = rank.where(rank > 0, 0.0)  # neither does NaN exceed anything
    return float(rank.topk(wanted, sorted=False).values.amin())


def _largest(
    values: Tensor, position: Tensor, k_total: int, by: By
) -> tuple[Tensor, Tensor, float]:
    """Of more than k_total active entries, in order, the largest, in order; and the least."""
    rank = _rank(values, by)
    least = rank.topk(k_total, sorted=False).values.amin()
    above, equal = rank > least, rank == least
    chosen = above | (equal & (equal.cumsum(0) <= k_total - above.sum()))
    at = torch.nonzero_static(chosen, size=k_total)[:, 0]
    return values[at], position[at], float(least)


def _largest_above(
    guess: float, chunks: Chunks, like: Tensor, k_total: int, by: By
) -> tuple[Tensor, Tensor]:
    """The k_total largest of the entries above the guess, or all; like is an empty [0, F]."""
    values, position = like.flatten(), like.flatten().long()
    threshold = torch.full(
        like.shape[1:], guess, dtype=torch.promote_types(like.dtype, torch.float32),
        device=like.device,
    )  # fmt: skip
    for first, pre in chunks:
        more, places = list_above(pre, threshold, by)
        del pre
        values = torch.cat([values, more])
        position = torch.cat([position, places.add_(first)])
        if len(values) > 2 * k_total:
            values, position, guess = _largest(values, position, k_total, by)
            threshold.fill_(guess)
    if len(values) > k_total:
        values, position, _ = _largest(values, position, k_total, by)
    return values, position


def _choose(
    chunks: Callable[[], Chunks], guesses: Iterable[float], like: Tensor, k_total: int, by: By
) -> tuple[Tensor, Tensor]:
    """Active entries and their positions, in order, by the first guess that is low enough."""
    values, position = like.flatten(), like.flatten().long()
    for guess in guesses if k_total else ():
        values, position = _largest_above(guess, chunks(), like, k_total, by)
        if len(values) == k_total:
            break
    return values, position


# --- topk_batch -----------------------------------------------------------------------------


def _topk_batch(pre: Tensor, k_total: int, by: str) -> Tensor:
    """Positions of the active entries in order, then -1: [N, F] -> [k_total]"""
    pre, (N, F) = pre.contiguous(), pre.shape
    rows = rows_at_a_time(pre, F)

    def chunks() -> Iterator[tuple[int, Tensor]]:
        return ((n * F, pre[n : n + rows]) for n in range(0, N, rows))

    def guesses() -> Iterator[float]:
        yield _guess(pre[:: max(N // SAMPLE, 1)], N, k_total, by)
        yield 0.0

    _, position = _choose(chunks, guesses(), pre[:0], k_total, by)
    return pad(position, (0, k_total - len(position)), value=-1)


_topk_batch_op = register_constant(
    _topk_batch, lambda pre, k_total, by: pre.new_empty(k_total, dtype=torch.int64)
)


# --- encode_topk_batch ----------------------------------------------------------------------


class _EncodeTopkBatch(RaggedEncoder):
    @staticmethod
    def forward(
        x: Tensor, W_enc: Tensor, b_enc: Tensor, k_total: int, by: str, hint: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        N, F = len(x), len(W_enc)

        def guesses() -> Iterator[float]:
            hinted = float(hint)
            if hinted > 0:
                yield hinted
            rows = x[:: max(N // SAMPLE, 1)].contiguous()
            sampled = _guess(product(rows, W_enc.contiguous(), b_enc.contiguous()), N, k_total, by)
            if sampled > 0 and not 0 < hinted <= sampled:
                yield sampled
            yield 0.0

        like = x.new_empty(0, F)
        chosen = _choose(lambda: products(x, W_enc, b_enc), guesses(), like, k_total, by)
        return in_rows(*chosen, N, F)


_encode_topk_batch = register(
    _EncodeTopkBatch, lambda x, W_enc, b_enc, k_total, by, hint: fake_rows(x)
)

# --- public ---------------------------------------------------------------------------------


def _check_total(k_total: int, N: int, F: int) -> None:
    if not 0 <= k_total <= N * F:
        raise ValueError(f"k_total must be between 0 and {N} * {F} = {N * F}, got {k_total}")


def topk_batch(pre: Tensor, k_total: int, by: By = "value") -> tuple[Tensor, Tensor, Tensor]:
    """The k_total largest entries of a whole batch, exactly.

    pre [N, F] floating -> values [k_total] in its dtype, and their tokens and latents, int64
    [k_total], in the order of (token, latent). by="value" ranks pre-activations and by="abs"
    magnitudes; ties go to the lowest (token, latent). Neither 0, nor a negative pre-activation
    by="value", nor NaN is ever active: if fewer than k_total are, value 0 at (0, 0) fills the end.
    Differentiable in pre through the active entries.

    Reads pre once, as a rule; the host waits for a GPU a few times per FASTSAE_BUFFER_MB of it.
    ValueError for a wrong shape or dtype, or unless 0 <= k_total <= N F.
    """
    check_shape("pre", pre, None, None)
    N, F = pre.shape
    check_by(by)
    _check_total(k_total, N, F)
    position = _topk_batch_op(pre.detach(), k_total, by)
    active, position = position >= 0, position.clamp(min=0)
    if not N:
        return pre.flatten(), position, position
    values = pre.flatten().gather(0, position).where(active, 0.0)
    return values, position // F, position % F


def encode_topk_batch(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k_total: int,
    by: By = "value",
    hint: Tensor | float = 0.0,
) -> Ragged:
    """Encode tokens and keep the k_total largest pre-activations of the whole batch, exactly.

    x [N, D] (already centered), W_enc [F, D], b_enc [F], one floating dtype -> pre [N, K] in that
    dtype, indices [N, K] int64 and count [N] int64 as encode_above returns them. Ranks, ties and
    what is never active are those of topk_batch. Differentiable in x, W_enc and b_enc, twice and
    more, through every entry that is listed.

    hint, a number or a tensor of one, changes the cost only: somewhat below the least of the last
    batch, it saves looking at a few rows first. 0 is no hint; too high a one costs a second
    product, and one far too low, memory for a long list of a chunk's entries.

    Costs 2 N F D FLOPs; no more than FASTSAE_BUFFER_MB of pre-activations exist at a time. The
    host waits for a GPU a few times per chunk. ValueError for wrong shapes or dtypes, or unless
    0 <= k_total <= N F.
    """
    check_encoder(x, W_enc, b_enc, by)
    _check_total(k_total, x.shape[0], W_enc.shape[0])
    if not isinstance(hint, Tensor):
        hint = torch.tensor(hint)
    if hint.numel() != 1:
        raise ValueError(f"hint must be one number, got shape {list(hint.shape)}")
    return Ragged(*_encode_topk_batch(x, W_enc, b_enc, k_total, by, hint.detach()))
