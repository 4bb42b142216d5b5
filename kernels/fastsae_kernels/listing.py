"""Flat lists of the pre-activations above a threshold, a chunk of tokens at a time.

    values [M]      h where h > threshold, or where |h| > threshold for by="abs"
    position [M]    n F + f of each, ascending

On a GPU one pass over a chunk counts each row's entries, and a second one lists them. On a CPU with
bfloat16 instructions, a bfloat16 GEMM finds what may be above the threshold, given the bound of
proof.py on all rounding errors, and the fp32 pre-activations of these decide.
Shapes: N tokens, M entries, F latents, D model width.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from ._launch import use_triton
from .encode import in_bfloat16
from .product import product, tokens_at_a_time
from .proof import UNIT, LowRows, bias_error, low_rows, rounding_bound, sums_error
from .sparse import ragged_dots
from .topk import By, _rank

SPARSE = 64
"""At most 1 / SPARSE of a chunk's entries are rescored: more would take longer than the fp32 GEMM,
by an estimate."""

Lists = tuple[Tensor, Tensor]
"""Values and positions."""


def list_above(pre: Tensor, threshold: Tensor, by: By) -> Lists:
    """Entries above the threshold and their positions: contiguous [N, F], [F] -> [M], [M].

    Reading M waits for the GPU.
    """
    if not use_triton(pre):
        return _list_torch(pre, threshold, by)
    from ._encode_above_kernel import launch_count, launch_list

    count = launch_count(pre, threshold, by)
    end = count.cumsum(0)
    return launch_list(pre, threshold, by, end - count, int(end[-1]))


def _list_torch(pre: Tensor, threshold: Tensor, by: By) -> Lists:
    position = _positions(_above(_rank(pre, by), threshold))
    return pre.flatten()[position], position


def _above(rank: Tensor, threshold: Tensor) -> Tensor:
    """Mask of entries above the threshold, flat and padded to a multiple of eight."""
    above = torch.zeros(-(-rank.numel() // 8) * 8, dtype=torch.bool, device=rank.device)
    torch.gt(rank, threshold, out=above[: rank.numel()].view(rank.shape))
    return above


def _positions(mask: Tensor) -> Tensor:
    # Few are true: test eight at a time, as one int64, then only the eights that are not all false.
    eights = mask.view(torch.int64)
    some = eights.nonzero()[:, 0]
    found = eights[some].view(torch.bool).view(len(some), 8).nonzero()
    return some[found[:, 0]].mul_(8).add_(found[:, 1])


def list_proved(
    x: Tensor, W: Tensor, b: Tensor, W_low: LowRows, threshold: Tensor, by: By
) -> Lists | None:
    """As list_above, of pre-activations in fp32: [N, D], contiguous [F, D], [F], [F] -> [M], [M].

    None where the fp32 GEMM is the better choice: if too many entries need to be rescored, or not
    all numbers are finite.
    """
    low = x.to(torch.bfloat16).contiguous()
    if by == "abs":
        least, bias = threshold.amin(), b.to(torch.bfloat16)
        error = bias_error(b)
    else:  # the same as h - threshold > 0, with biases that are never too low
        shifted = b - threshold
        least, bias = threshold.new_zeros(()), rounded_up(shifted)
        error = sums_error(x.shape[1]) * shifted.abs().amax()
    error = error + 2 * sums_error(x.shape[1]) * b.abs().amax()
    limit = least - rounding_bound(x, low, W_low, error, least)
    limit -= 3 * UNIT * limit.abs()  # rounding an entry at the limit, and then the limit itself
    if not limit.isfinite().all():
        return None
    pre = product(low, W_low.rows, bias)
    mask = _above(pre.abs_() if by == "abs" else pre, limit.to(torch.bfloat16)[:, None])
    too_many = SPARSE * mask.count_nonzero() > pre.numel()
    del pre
    if too_many:
        return None
    position = _positions(mask)
    if not len(position):
        return x.new_empty(0), position
    start = torch.searchsorted(position, torch.arange(len(x) + 1) * len(W))
    latents = position % len(W)
    h = ragged_dots(x, start, latents, W) + b[latents]
    kept = (_rank(h, by) > threshold[latents]).nonzero()[:, 0]
    return h[kept], position[kept]


def rounded_up(b: Tensor) -> Tensor:
    """The smallest number in bfloat16 that is at least as large, for each."""
    low = b.to(torch.bfloat16)
    return torch.where(low.float() < b, low.nextafter(low.new_tensor(torch.inf)), low)


class Listing:
    """Lists the entries of x W^T + b above a threshold: [N, D], [F, D], [F].

    `expected` is how many entries a token has, if known. After `tries` chunks that bfloat16 did not
    list, the others, which are probably no better, use fp32. Both affect the cost only.
    """

    def __init__(self, x: Tensor, W: Tensor, b: Tensor, by: By, expected: int = 1, tries: int = 1):
        # oneDNN's operator ignores strides
        self.x, self.W, self.b, self.by = x.contiguous(), W.contiguous(), b.contiguous(), by
        self.low = low_rows(self.W) if in_bfloat16(x, W, expected) else None
        self.tries = tries

    def chunks(self) -> Iterator[tuple[slice, Callable[[Tensor], Lists]]]:
        """For each chunk of tokens, the positions of its entries, and a function that lists those
        above thresholds [F], with positions in the chunk."""
        F, rows = len(self.W), tokens_at_a_time(self.x, len(self.W))
        for start in range(0, len(self.x), rows):
            x = self.x[start : start + rows]
            yield slice(start * F, (start + len(x)) * F), partial(self._list, x)

    def _list(self, x: Tensor, threshold: Tensor) -> Lists:
        if self.low is not None:
            found = list_proved(x, self.W, self.b, self.low, threshold, self.by)
            if found is not None:
                return found
            self.tries -= 1
            if not self.tries:
                self.low = None
        return list_above(product(x, self.W, self.b), threshold, self.by)
