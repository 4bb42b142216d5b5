"""The k largest pre-activations, from a bfloat16 GEMM on a CPU and a proof that they are; with the
bound that listing.py needs for those above a threshold.

    found = the C latents with the largest bfloat16 pre-activations, C > k
    h = x . W[found] + b[found], by sums in fp32; kept are the k largest of these

With a the smallest bfloat16 pre-activation in `found` and v the k-th largest h, no other latent can
be among the k largest if v > a + the largest possible difference of the two. That is, with low()
for rounding to bfloat16 and gamma for what rounding can change two fp32 sums of D products,

    |x - low(x)| max_f |W[f]| + |x| max_f (|W[f] - low(W[f])| + gamma |W[f]|)
      + max_f |b[f] - low(b[f])| + gamma max_f |b[f]| + 2^-8 |a|

For tokens where that does not hold, more candidates are tried. On processors with bfloat16
instructions this is faster than the fp32 GEMM. For by="abs", pre-activations are magnitudes; for
by="value", negative ones in bfloat16 count as 0, so a token with fewer than k positive ones has no
proof.
Shapes: N tokens, K kept, C candidates per token, F latents, D model width; all float32.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm

from ._launch import CPU_BF16
from .product import has_bf16, product, tokens_at_a_time
from .rescore import ranked
from .topk import By, activated, write_topk

ROUNDS = 2, 4
"""Candidates as multiples of k: first, and for tokens without a proof."""

PROBED, PART = 32, 8
"""Tokens whose fp32 pre-activations tell whether proofs are likely, with one in eight latents."""

USUAL_ERROR = 0.4
"""Usual norm of the rounding errors of a vector, as a multiple of UNIT times its own."""

LEAST = 8
"""Minimum number of candidates beyond k."""

UNIT = 2.0**-8
"""The largest relative error of rounding to bfloat16."""

SMALL = 2.0**-60
"""The squares of smaller numbers may be 0 in fp32, so that norms lack them."""


class LowRows(NamedTuple):
    """A matrix in bfloat16, and bounds on the norms of its rows."""

    rows: Tensor
    """bfloat16 [F, D]"""
    norm: Tensor
    """of the matrix in fp32"""
    error: Tensor
    """of the matrix in fp32 minus its copy"""


def norms(x: Tensor) -> Tensor:
    """Bounds on the norms of rows: [N, D] -> [N]"""
    return vector_norm(x, dim=1) + x.shape[1] ** 0.5 * SMALL


def sums_error(D: int) -> float:
    """What rounding can change two fp32 sums of D products, in any order, relative to |x| |w|; in
    one of them, an addition may err twice as much as in fp32 (as Arm's bfloat16 instructions)."""
    return 3 * (D + 2) * 2.0**-24


def rounding_bound(x: Tensor, low: Tensor, W: LowRows, bias: Tensor, proposed: Tensor) -> Tensor:
    """Bound on the difference between a pre-activation as proposed and as rescored.

    x and its copy in bfloat16 [N, D], a bound on what biases add to it [], a pre-activation of each
    token as proposed [N] or [] -> [N], for all latents.
    """
    D, gamma = x.shape[1], sums_error(x.shape[1])
    x_norm, x_error = norms(x), norms(low.float().sub_(x))
    products = x_error * W.norm + (x_norm + x_error) * (W.error + gamma * W.norm)
    flushed = D * torch.finfo(torch.float32).tiny  # subnormal products may count as 0
    return 1.01 * (products + bias + UNIT * proposed.abs()) + flushed


def bias_error(b: Tensor) -> Tensor:
    """The largest error of rounding biases to bfloat16: [F] -> []"""
    return (b.to(torch.bfloat16).float() - b).abs().amax()


def bfloat16_pays(N: int, F: int, k: int) -> bool:
    """Whether a bfloat16 GEMM with `select_proved`, if proofs are likely, or with `list_proved` is
    faster than the fp32 GEMM.

    Otherwise, copying W or rescoring 2 k candidates costs more than the GEMM saves.
    FASTSAE_CPU_BF16=0 or 1 decides for all sizes and CPUs.
    """
    if CPU_BF16 is not None:
        return CPU_BF16 == "1"
    fast = has_bf16() and torch.backends.mkldnn.is_available()
    return fast and N >= 1024 and 128 * k <= F


def prepare(x: Tensor, W: Tensor, b: Tensor, k: int, by: By) -> LowRows | None:
    """W for `select_proved`, unless proofs are unlikely for these tokens: [N, D], [F, D], [F].

    With FASTSAE_CPU_BF16=1, they are always tried.
    """
    norm = norms(W).amax()
    if CPU_BF16 is None and not proofs_are_likely(x, W, norm, b, k, by):
        return None
    return low_rows(W, norm)


def low_rows(W: Tensor, norm: Tensor | None = None) -> LowRows:
    """W in bfloat16: [F, D] and, if known, the largest of its `norms`."""
    norm = norms(W).amax() if norm is None else norm
    copy, errors = torch.empty_like(W, dtype=torch.bfloat16), []
    at_a_time = max(1, (4 << 20) // (4 * max(W.shape[1], 1)))  # what stays in the cache
    for w, low in zip(W.split(at_a_time), copy.split(at_a_time), strict=True):
        low.copy_(w)
        errors.append(norms(low.float().sub_(w)).amax())
    return LowRows(copy, norm, torch.stack(errors).amax())


def proofs_are_likely(x: Tensor, W: Tensor, norm: Tensor, b: Tensor, k: int, by: By) -> bool:
    """Whether the gap between the k-th and 2 k-th largest pre-activations usually exceeds rounding
    errors, where `norm` is the largest of a row of W.

    It is measured on some tokens and latents. Compared with the errors, it shrinks with D: wide
    SAEs may need the fp32 GEMM.
    """
    x, k = x[:: max(len(x) // PROBED, 1)].contiguous(), max(k // PART, 1)
    pre = product(x, W[::PART].contiguous(), b[::PART].contiguous())
    rank = (
        (pre.abs_() if by == "abs" else pre.relu_()).topk(min(ROUNDS[0] * k, pre.shape[1])).values
    )
    gap, last = rank[:, k - 1] - rank[:, -1], rank[:, -1].abs()
    error = 2 * USUAL_ERROR * UNIT + sums_error(x.shape[1])
    bound = error * norm * norms(x) + bias_error(b) + UNIT * last
    return bool(gap.mean() > bound.mean())


def select_proved(
    x: Tensor, W: Tensor, b: Tensor, W_low: LowRows, k: int, by: By
) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest pre-activations of each token, and the tokens for which there is no proof.

    x [N, D], contiguous W [F, D], b [F] -> values and indices [N, K] as of encode_topk, and
    ascending tokens [n]. Once these are most of the tokens so far, no others are tried.
    """
    N, F = len(x), len(W)
    values, indices = x.new_empty(N, k), torch.empty(N, k, dtype=torch.int64)
    low, low_b = x.to(torch.bfloat16).contiguous(), b.to(torch.bfloat16)
    bias = bias_error(b) + sums_error(x.shape[1]) * b.abs().amax()
    unproved, chunk = torch.arange(0), tokens_at_a_time(low, F)
    for start in range(0, N, chunk):
        rows: slice | Tensor = slice(start, min(start + chunk, N))
        pre = product(low[rows], W_low.rows, low_b)
        # Candidates among negative numbers would take several times as long to find.
        pre = pre.abs_() if by == "abs" else pre.relu_()
        for times in ROUNDS:
            found = torch.empty(len(pre), min(max(times * k, k + LEAST), F), dtype=torch.int64)
            write_topk(pre, found.shape[1], "value", None, found, "any")
            h, latents = ranked(x[rows], W, b, found, k, by)
            values[rows], indices[rows] = activated(h, by), latents
            if found.shape[1] == F:
                break
            least = pre.gather(1, found).amin(1).float()
            bound = rounding_bound(x[rows], low[rows], W_low, bias, least)
            last = h[:, -1].abs() if by == "abs" else h[:, -1]
            left = (~(last > least + bound)).nonzero()[:, 0]  # also with NaN
            if not len(left):
                break
            pre, rows = pre[left], left + start if isinstance(rows, slice) else rows[left]
        else:
            unproved = torch.cat([unproved, rows])
            if 2 * len(unproved) > start + chunk:
                unproved = torch.cat([unproved, torch.arange(start + chunk, N)])
                break
        del pre  # before the next chunk is allocated: the budget is for one
    return values, indices, unproved
