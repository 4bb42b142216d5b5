"""Exact top-k over a whole batch: the k_total largest entries (BatchTopK, arXiv:2412.06410).

    topk_batch(pre, k_total)                     max(h, 0) at the k_total largest h of [N, F]
    topk_batch(pre, k_total, by="abs")           h at the k_total largest |h|
    encode_topk_batch(x, W_enc, b_enc, k_total)  the same for h = x W_enc^T + b_enc, as padded rows

The algorithm guesses the smallest value that is kept, and lists the entries above the guess, a
chunk of tokens at a time. Whenever a list exceeds its limit, only the largest stay, k_total or
somewhat more than this part of the batch should have, and the smallest of them becomes the guess,
so that later ties lose to earlier ones. If k_total entries were found, the guess was low enough and
these are the largest; if not, another guess is tried. A guess of 0 always succeeds if k_total
stay each time, since entries of value 0 are not active. The first guess comes from the caller or
from a few rows of the batch.
Shapes: N tokens, F latents, D model width, K the largest count of a row, M entries of a list.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from ._launch import check_shape, rows_at_a_time
from ._op import register, register_constant
from .encode import check_encoder
from .encode_above import Ragged, RaggedEncoder, fake_rows, in_rows, listed_reference
from .listing import Listing, Lists, list_above
from .product import product
from .topk import By, _rank, check_by

# --- references: the specification ----------------------------------------------------------


def _positions_reference(h: Tensor, k_total: int, by: By) -> Tensor:
    """Positions of the active entries in the flattened h, ascending: [N, F] -> [M], M <= k_total"""
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


# --- the algorithm --------------------------------------------------------------------------

Chunks = Iterable[tuple[slice, Callable[[Tensor], Lists]]]
"""For each chunk of tokens the positions of its entries, and a function that lists those above
thresholds [F], as of Listing.chunks."""

SAMPLE = 64
"""Rows that a guess is made from; up to twice as many."""

MARGIN = 1.25
"""Entries to expect above a guess, as a multiple of k_total, since rows differ; and how many more
than should stay a list may have."""


class Guess(NamedTuple):
    """A guess of the smallest value that is kept."""

    value: float
    adapts: bool = False
    """Whether it rises where the first chunks have about twice their share of entries above it. It
    then fails if later chunks have about a third fewer than these."""

    def limits(self, k_total: int, share: float) -> tuple[int, float]:
        """How many entries stay, of more than how many, in this share of the batch."""
        if not self.adapts:
            return k_total, 2 * k_total
        expected = share * k_total
        keep = min(k_total, math.ceil(1.5 * expected + 4 * math.sqrt(expected)))
        return keep, MARGIN * keep


def _sampled(rows: Tensor, N: int, k_total: int, by: By) -> float:
    """A value that about MARGIN k_total entries exceed, estimated from some of N rows; or 0."""
    wanted = math.ceil(MARGIN * k_total * len(rows) / N)
    rank = _rank(rows, by).flatten()
    if not 0 < wanted < len(rank):
        return 0.0
    rank = rank.where(rank > 0, 0.0)  # also replaces NaN
    return float(rank.topk(wanted, sorted=False).values.amin())


def _largest(values: Tensor, position: Tensor, k: int, by: By) -> tuple[Tensor, Tensor, float]:
    """The k largest of more active entries, in the same order, and the smallest rank kept."""
    rank = _rank(values, by)
    least = rank.topk(k, sorted=False).values.amin()
    above, equal = rank > least, rank == least
    chosen = above | (equal & (equal.cumsum(0) <= k - above.sum()))
    at = torch.nonzero_static(chosen, size=k)[:, 0]
    return values[at], position[at], float(least)


def _largest_above(
    guess: Guess, chunks: Chunks, like: Tensor, size: int, k_total: int, by: By
) -> tuple[Tensor, Tensor, float]:
    """The entries above the guess, at most the k_total largest of `size`, and what the guess was in
    the end; `like` is an empty [0, F]."""
    values, position, least = like.flatten(), like.flatten().long(), guess.value
    threshold = torch.full(
        like.shape[1:], guess.value, dtype=torch.promote_types(like.dtype, torch.float32),
        device=like.device,
    )  # fmt: skip
    for at, list_chunk in chunks:
        more, places = list_chunk(threshold)
        values = torch.cat([values, more])
        position = torch.cat([position, places.add_(at.start)])
        keep, limit = guess.limits(k_total, at.stop / size)
        if len(values) > limit:
            values, position, least = _largest(values, position, keep, by)
            threshold.fill_(least)
    if len(values) > k_total:
        values, position, _ = _largest(values, position, k_total, by)
    return values, position, least


def _choose(
    chunks: Callable[[], Chunks],
    guesses: Iterable[Guess],
    like: Tensor,
    size: int,
    k_total: int,
    by: By,
) -> tuple[Tensor, Tensor]:
    """Active entries and their positions, ascending, from the first guess that is low enough."""
    values, position, too_high = like.flatten(), like.flatten().long(), math.inf
    for guess in guesses if k_total else ():
        if guess.value >= too_high:
            continue
        values, position, too_high = _largest_above(guess, chunks(), like, size, k_total, by)
        if len(values) == k_total or too_high == 0:
            break
    return values, position


# --- topk_batch -----------------------------------------------------------------------------


def _topk_batch(pre: Tensor, k_total: int, by: str) -> Tensor:
    """Positions of the active entries, ascending, padded with -1: [N, F] -> [k_total]"""
    pre, (N, F) = pre.contiguous(), pre.shape
    rows = rows_at_a_time(pre, F)

    def chunks() -> Chunks:
        for n in range(0, N, rows):
            chunk = pre[n : n + rows]
            yield slice(n * F, (n + len(chunk)) * F), partial(list_above, chunk, by=by)

    def guesses() -> Iterator[Guess]:
        yield Guess(_sampled(pre[:: max(N // SAMPLE, 1)], N, k_total, by))
        yield Guess(0.0)

    _, position = _choose(chunks, guesses(), pre[:0], N * F, k_total, by)
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

        def guesses() -> Iterator[Guess]:
            hinted = float(hint)
            if 0 < hinted <= torch.finfo(torch.float32).max:
                yield Guess(hinted, adapts=True)
            rows = x[:: max(N // SAMPLE, 1)].contiguous()
            pre = product(rows, W_enc.contiguous(), b_enc.contiguous())
            yield Guess(_sampled(pre, N, k_total, by))
            yield Guess(0.0)

        like = x.new_empty(0, F)
        # Two tries: the first chunk may raise the guess, so that the second has fewer entries.
        listing = Listing(x, W_enc, b_enc, by, -(-k_total // max(N, 1)), tries=2)
        chosen = _choose(listing.chunks, guesses(), like, N * F, k_total, by)
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
    magnitudes; ties go to the lowest (token, latent). Zeros, NaN and, with by="value", negative
    pre-activations are never active: if fewer than k_total entries are, the results are padded with
    value 0 at (0, 0). Differentiable in pre through the active entries.

    Usually reads pre once; the host waits for a GPU a few times per FASTSAE_BUFFER_MB of it.
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
    entries that are never active are as in topk_batch. Differentiable in x, W_enc and b_enc, twice
    and more, through every entry that is listed.

    hint, a number or a tensor of one, is a guess of the smallest value kept. It affects the cost
    only: a value somewhat below that of the last batch saves sampling a few rows. 0 is no hint. If
    it is too high, the GEMM runs again; if it is far too low, lists of entries take more memory,
    and the GEMM also runs again where the first tokens have far more entries than others.

    Costs 2 N F D FLOPs; no more than FASTSAE_BUFFER_MB of pre-activations exist at a time. On a CPU
    with bfloat16 instructions, the GEMM may be in bfloat16, as that of encode_above: entries are
    those of fp32 sums. The host waits for a GPU a few times per chunk. ValueError for wrong shapes
    or dtypes, or unless 0 <= k_total <= N F.
    """
    check_encoder(x, W_enc, b_enc, by)
    _check_total(k_total, x.shape[0], W_enc.shape[0])
    if not isinstance(hint, Tensor):
        hint = torch.tensor(hint)
    if hint.numel() != 1:
        raise ValueError(f"hint must be one number, got shape {list(hint.shape)}")
    return Ragged(*_encode_topk_batch(x, W_enc, b_enc, k_total, by, hint.detach()))
