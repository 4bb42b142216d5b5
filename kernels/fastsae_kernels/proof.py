"""The k largest pre-activations, from a bfloat16 GEMM on a CPU and a proof that they are.

    found = the C latents with the largest bfloat16 pre-activations, C > k
    h = x . W[found] + b[found], by sums in fp32; kept are the k largest of these

With a the smallest bfloat16 pre-activation in `found`, v the k-th largest h, low() for rounding to
bfloat16, and gamma the error of fp32 sums of D products, no other latent can be among the k largest
if

    v > a + |x - low(x)| max_f |W[f]| + |x| max_f (|W[f] - low(W[f])| + gamma |W[f]|)
          + max_f |b[f] - low(b[f])| + 2^-8 |a|

With 2 k candidates that holds for nearly all tokens of the SAEs and activations that we measured.
For the others, more candidates are tried. On processors with bfloat16 instructions this takes
around half of the time of the fp32 GEMM.
Shapes: N tokens, K kept, C candidates per token, F latents, D model width.
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


class LowRows(NamedTuple):
    """A matrix in bfloat16, and the largest norms of rows, in fp32."""

    rows: Tensor
    """bfloat16 [F, D]"""
    norm: Tensor
    """of the matrix"""
    error: Tensor
    """of the matrix minus its copy"""


def low_rows(W: Tensor) -> LowRows:
    copy, errors = torch.empty_like(W, dtype=torch.bfloat16), []
    at_a_time = max(1, (4 << 20) // (W.element_size() * W.shape[1]))  # what stays in the cache
    for w, low in zip(W.split(at_a_time), copy.split(at_a_time), strict=True):
        low.copy_(w)
        errors.append(vector_norm(low.to(W.dtype).sub_(w), dim=1).amax())
    return LowRows(copy, vector_norm(W, dim=1).amax(), torch.stack(errors).amax())


def sums_error(D: int) -> float:
    """Bound on the error of two sums of D products in fp32, in any order, relative to |x| |w|."""
    return 2 * (D + 2) * 2.0**-24


def rounding_bound(x: Tensor, low: Tensor, b: Tensor, W: LowRows, largest: Tensor) -> Tensor:
    """Bound on the difference of a pre-activation as rescored and as a bfloat16 product.

    x and its copy in bfloat16 [N, D], b [F], the magnitude of the product [N] -> [N] in fp32, for
    all latents.
    """
    D, tiny, gamma = x.shape[1], torch.finfo(torch.float32).tiny, sums_error(x.shape[1])
    x_norm, x_error = (vector_norm(t, dim=1).float() for t in (x, low.to(x.dtype).sub_(x)))
    products = x_error * W.norm + (x_norm + x_error) * (W.error + gamma * W.norm)
    bias = (b.to(low.dtype) - b).abs().amax() + gamma * b.abs().amax()
    output = UNIT * largest.abs()
    flushed = D * tiny * (1 + W.norm + x_norm)  # subnormal numbers may count as 0
    return 1.01 * (products + bias + output) + flushed


def bfloat16_pays(N: int, F: int, k: int) -> bool:
    """Whether `select_proved` is faster than the fp32 GEMM, if proofs are likely.

    Otherwise, copying W or rescoring 2 k candidates costs more than the GEMM saves.
    FASTSAE_CPU_BF16=0 or 1 decides for all sizes and CPUs.
    """
    if CPU_BF16 is not None:
        return CPU_BF16 == "1"
    return has_bf16() and N >= 1024 and 128 * k <= F


def proofs_are_likely(x: Tensor, W: Tensor, b: Tensor, k: int, by: By) -> bool:
    """Whether the gap between the k-th and 2 k-th largest pre-activations usually exceeds rounding
    errors: [N, D], [F, D], [F].

    It is measured on some tokens and latents. Compared with the errors, it shrinks with D: wide
    SAEs may need the fp32 GEMM.
    """
    if CPU_BF16 is not None:
        return True
    x, rows = x[:: max(len(x) // PROBED, 1)].contiguous(), slice(None, None, PART)
    W, b, k = W[rows].contiguous(), b[rows].contiguous(), max(k // PART, 1)
    pre = product(x, W, b)
    rank = (pre.abs_() if by == "abs" else pre).topk(min(ROUNDS[0] * k, len(W))).values
    error = 2 * USUAL_ERROR * UNIT + sums_error(x.shape[1])
    norms = vector_norm(W, dim=1).amax() * vector_norm(x, dim=1)
    gap, last = rank[:, k - 1] - rank[:, -1], rank[:, -1].abs()
    return bool(gap.mean() > (error * norms + UNIT * last).mean())


def select_proved(x: Tensor, W: Tensor, b: Tensor, k: int, by: By) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest pre-activations of each token, and which are not proved to be.

    x [N, D], W [F, D], b [F] -> values and indices [N, K] as of encode_topk, and the tokens whose
    are not proved, ascending [n]: all, if they are most tokens of the first chunk.
    """
    N, F = len(x), len(W)
    values, indices = x.new_empty(N, k), torch.empty(N, k, dtype=torch.int64)
    W_low, low, low_b = low_rows(W), x.to(torch.bfloat16).contiguous(), b.to(torch.bfloat16)
    unproved, chunk = [torch.arange(0)], tokens_at_a_time(low, F)
    for start in range(0, N, chunk):
        rows: slice | Tensor = slice(start, min(start + chunk, N))
        pre = product(low[rows], W_low.rows, low_b)
        pre = pre.abs_() if by == "abs" else pre
        for times in ROUNDS:
            found = torch.empty(len(pre), min(max(times * k, k + LEAST), F), dtype=torch.int64)
            write_topk(pre, found.shape[1], "value", None, found, "any")
            h, latents = ranked(x[rows], W, b, found, k, by)
            values[rows], indices[rows] = activated(h, by).to(x.dtype), latents
            if found.shape[1] == F:
                break
            least = pre.gather(1, found).amin(1).to(h.dtype)
            bound = rounding_bound(x[rows], low[rows], b, W_low, least)
            last = h[:, -1].abs() if by == "abs" else h[:, -1]
            left = (~(last > least + bound)).nonzero()[:, 0]  # also with NaN
            if start == 0 and len(left) > min(chunk, N) / 2:
                return values, indices, torch.arange(N)
            if not len(left):
                break
            pre, rows = pre[left], left + start if isinstance(rows, slice) else rows[left]
        else:
            unproved.append(rows)
        del pre  # before the next chunk is allocated: the budget is for one
    return values, indices, torch.cat(unproved)
