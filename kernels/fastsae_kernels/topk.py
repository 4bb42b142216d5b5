"""Exact top-k of each row, with ties to the lowest index.

    topk(pre, k, by)    values, indices: [N, F] -> [N, K], largest first

Each of the k largest entries lies in one of the k groups with the largest maxima: otherwise k
larger maxima would exceed it. So one pass computes the maximum of each group of G entries; the k
best groups are then selected among F / G maxima (by the same method), and the k best entries among
their k G members. On a CPU, group g holds entries g, g + M, g + 2 M, ...: neighbors in memory
belong to different groups, so that the pass needs no reduction within a vector register.

Shapes: N tokens, F latents, K kept, G entries per group, M groups.
"""

from typing import Literal

import torch
from torch import Tensor

from ._launch import check_shape, rows_at_a_time, use_triton
from ._op import register_constant

By = Literal["value", "abs"]
Ties = Literal["lowest", "any"]

DTYPES = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}
"""Input dtypes of the kernel, and how many of a float32's low bits each of them lacks."""

MAX_K = 1024
"""The largest k that the kernel supports: it keeps at least 4 k maxima in registers."""

# --- reference: the specification -----------------------------------------------------------


def topk_reference(pre: Tensor, k: int, by: By = "value") -> tuple[Tensor, Tensor]:
    """[N, F] -> [N, K], [N, K]"""
    rank = _rank(pre, by)
    indices = rank.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return activated(pre.gather(1, indices), by), indices


def activated(values: Tensor, by: By) -> Tensor:
    """Kept pre-activations to values of latents: an entry of value 0 gets no gradient."""
    return values.where(values != 0, 0.0) if by == "abs" else values.relu()


# --- torch path: what runs without a GPU ----------------------------------------------------


def _topk_indices_torch(pre: Tensor, k: int, by: By) -> Tensor:
    """Indices of the k largest of each row, largest first, ties to the lowest index."""
    if pre.is_cuda:  # cases that the kernel does not support; must not read values on the host
        rank = _rank(pre, by)
        return _lowest_of_equals(rank, rank.topk(k).values[:, -1:], k)
    # One entry more than k, to notice a tie between places k and k + 1.
    indices = _largest(pre, min(k + 1, pre.shape[1]), by, ordered=True)
    rank = _rank(pre.gather(1, indices), by)
    tied = ~(rank[:, 1:] < rank[:, :-1]).all(1)  # also rows with NaN, which compares as a tie
    tied = tied.nonzero()[:, 0]
    indices = indices[:, :k]
    if tied.numel():
        indices[tied] = _lowest_of_equals(_rank(pre[tied], by), rank[tied, k - 1 : k], k)
    return indices


def _rank(pre: Tensor, by: By) -> Tensor:
    return pre.abs() if by == "abs" else pre


def _largest(pre: Tensor, k: int, by: By, ordered: bool = False) -> Tensor:
    """Indices of k largest entries of each row, ties in any order; largest first if `ordered`."""
    N, F = pre.shape
    G = _group_size(F, k)
    if G == 1:
        return _best(_rank(pre, by), k, ordered)
    M = F // G
    groups = pre[:, : M * G].unflatten(1, (G, M))
    maxima = groups.amax(1)
    if by == "abs":
        maxima = torch.maximum(maxima, groups.amin(1).neg_())
    best = _largest(maxima, k, "value")
    steps = torch.arange(0, M * G, M, device=pre.device)
    members = (best[:, None, :] + steps[:, None]).flatten(1)
    if M * G < F:  # the last entries are in no group, and are always candidates
        rest = torch.arange(M * G, F, device=pre.device).expand(N, -1)
        members = torch.cat([members, rest], dim=1)
    return members.gather(1, _best(_rank(pre.gather(1, members), by), k, ordered))


def _largest_any(pre: Tensor, k: int, by: By) -> Tensor:
    """_largest, but NaN may count as a negative number."""
    if by == "value" and pre.itemsize == 2:
        # Maxima of integers take a third of the time. Negative numbers are in reverse order: rows
        # where one is among the largest are searched again.
        bits = pre.view(torch.int16)
        found = _largest(bits, k, by)
        rows = (bits.gather(1, found) < 0).any(1).nonzero()[:, 0]
        if 2 * len(rows) <= len(pre):
            if len(rows):
                found[rows] = _largest(pre[rows], k, by)
            return found
    return _largest(pre, k, by)


def largest_in_columns(pre: Tensor, k: int) -> Tensor:
    """Indices of k largest entries of each column, in any order: contiguous [F, N] -> [N, K].

    Here groups are of neighboring rows: their maxima are computed for many columns at a time. NaN
    may count as a negative number.
    """
    if pre.itemsize == 2:
        bits = pre.view(torch.int16)  # as in _largest_any
        found = _columns(bits, k)
        columns = (bits.gather(0, found.t()) < 0).any(0).nonzero()[:, 0]
        if 2 * len(columns) <= pre.shape[1]:
            if len(columns):
                found[columns] = _columns(pre.index_select(1, columns), k)
            return found
    return _columns(pre, k)


def _columns(pre: Tensor, k: int) -> Tensor:
    F, N = pre.shape
    G = _group_size(F, k)
    M = F // G
    best = _largest(pre[: M * G].unflatten(0, (M, G)).amax(1).t().contiguous(), k, "value")
    members = (best[:, :, None] * G + torch.arange(G)).flatten(1)
    if M * G < F:  # the last entries are in no group, and are always candidates
        members = torch.cat([members, torch.arange(M * G, F).expand(N, -1)], dim=1)
    places = members * N + torch.arange(N)[:, None]
    found = pre.flatten().index_select(0, places.flatten()).view_as(places)
    return members.gather(1, _best(found, k, ordered=False))


def _group_size(F: int, k: int) -> int:
    """Entries per group; 1 if groups would not save time."""
    return 8 if F // k >= 160 else 4 if F // k >= 16 else 1


def _best(rank: Tensor, k: int, ordered: bool) -> Tensor:
    """Indices of k largest; NaN is larger than any number."""
    integer = {2: torch.int16, 4: torch.int32}.get(rank.itemsize)
    if integer is None or (rank.is_floating_point() and rank.sum().isnan()):
        return rank.topk(k, sorted=ordered).indices
    # Integers are compared faster. Bits of negative numbers are flipped: their order is reversed.
    bits = rank.contiguous().view(integer)
    flipped = (bits >> (8 * rank.itemsize - 1)).bitwise_and_(torch.iinfo(integer).max)
    return flipped.bitwise_xor_(bits).topk(k, sorted=ordered).indices


def _lowest_of_equals(rank: Tensor, least: Tensor, k: int) -> Tensor:
    """Top-k with ties to the lowest index, given each row's k-th largest rank, least [N, 1]."""
    above, equal = rank > least, rank == least
    nan, least_nan = rank.isnan(), least.isnan()
    above, equal = above | (nan & ~least_nan), equal | (nan & least_nan)
    vacant = k - above.sum(1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(1) <= vacant))
    places = torch.nonzero_static(chosen, size=len(rank) * k)  # k per row: no need to count
    indices = places[:, 1].view(-1, k)
    order = rank.gather(1, indices).sort(dim=1, descending=True, stable=True).indices
    return indices.gather(1, order)


# --- public ---------------------------------------------------------------------------------


def check_choice(k: int, by: By, F: int) -> None:
    """Raise ValueError unless 1 <= k <= F and `by` is valid."""
    if not 1 <= k <= F:
        raise ValueError(f"k must be between 1 and d_sae = {F}, got {k}")
    check_by(by)


def check_by(by: By) -> None:
    """Raise ValueError unless `by` is valid."""
    if by not in ("value", "abs"):
        raise ValueError(f'by must be "value" or "abs", got {by!r}')


def write_topk(
    pre: Tensor, k: int, by: By, values: Tensor | None, indices: Tensor, ties: Ties = "lowest"
) -> None:
    """Write the results of topk into contiguous [N, K]; no values if None.

    Indices are int64; the kernel also writes int32. This is a plain function, to be called for each
    chunk: a library op would take another 30 microseconds per call.
    """
    if use_triton(pre) and pre.dtype in DTYPES and k <= MAX_K:
        from ._topk_kernel import launch_topk

        launch_topk(pre if pre.stride(1) == 1 else pre.contiguous(), k, by, values, indices)
        return
    # In chunks of rows: on a CPU candidates stay in the cache, and on a GPU masks and int64 sums
    # fit in the budget.
    rows = rows_at_a_time(pre, pre.shape[1] * (8 if pre.is_cuda else 1))
    find = _largest_any if ties == "any" and not pre.is_cuda else _topk_indices_torch
    for start in range(0, len(pre), rows):
        indices[start : start + rows] = find(pre[start : start + rows], k, by)
    if values is not None:
        torch.gather(pre, 1, indices, out=values)
        if by == "value":
            values.relu_()


def _topk_indices(pre: Tensor, k: int, by: str, ties: str) -> Tensor:
    indices = torch.empty(len(pre), k, dtype=torch.int64, device=pre.device)
    write_topk(pre, k, by, None, indices, ties)
    return indices


_topk_indices_op = register_constant(
    _topk_indices, lambda pre, k, by, ties: pre.new_empty(pre.shape[0], k, dtype=torch.int64)
)


def topk_indices(pre: Tensor, k: int, by: By = "value", *, ties: Ties = "lowest") -> Tensor:
    """Indices of the k largest entries of each row: [N, F] -> int64 [N, K], largest first.

    by="abs" ranks magnitudes. Ties go to the lowest index, in order and in selection; ties="any",
    for callers that rank again, guarantees neither an order nor which of equals are selected, nor
    that NaN counts as large.
    ValueError unless 1 <= k <= F.
    """
    check_shape("pre", pre, None, None)
    check_choice(k, by, pre.shape[1])
    return _topk_indices_op(pre.detach(), k, by, ties)


def topk(pre: Tensor, k: int, by: By = "value") -> tuple[Tensor, Tensor]:
    """The k largest entries of each row, exactly: [N, F] -> values [N, K], indices int64 [N, K].

    by="value" keeps the k largest pre-activations and sets negative ones to 0 (TopK,
    arXiv:2406.04093); by="abs" keeps the k largest magnitudes with their signs (AbsTopK,
    arXiv:2510.00404). Largest first; ties to the lowest index. Differentiable in pre: an entry of
    value 0 gets no gradient. Reads pre once. ValueError unless 1 <= k <= F.
    """
    indices = topk_indices(pre, k, by)
    return activated(pre.gather(1, indices), by), indices
