"""The kernel of encode_above.py: one pass counts each row's entries, the next one lists them.

Shapes: N tokens, F latents, M entries in all.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch, power_of_2
from .topk import By

# --- kernel: all tensors row-major ----------------------------------------------------------


@triton.jit
def _above_kernel(
    pre_ptr, threshold_ptr, rows_ptr, values_ptr, position_ptr, F,
    BLOCK: tl.constexpr, ABS: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """Count a row's entries above the threshold, or LIST them from the row's first place on."""
    n = tl.program_id(0).to(tl.int64)
    place = tl.load(rows_ptr + n) if LIST else tl.zeros((), dtype=tl.int64)
    for start in range(0, F, BLOCK):
        f = start + tl.arange(0, BLOCK)
        threshold = tl.load(threshold_ptr + f, mask=f < F, other=float("inf"))
        h = tl.load(pre_ptr + n * F + f, mask=f < F, other=0.0).to(threshold.dtype)
        above = ((tl.abs(h) if ABS else h) > threshold).to(tl.int32)
        found = tl.sum(above)
        if LIST and found > 0:
            at = tl.cumsum(above) - 1
            tl.store(values_ptr + place + at, h, mask=above != 0)
            tl.store(position_ptr + place + at, n * F + f, mask=above != 0)
        place += found
    if not LIST:
        tl.store(rows_ptr + n, place)


# --- launchers ------------------------------------------------------------------------------

BLOCK = 2048
"""Entries of a row per iteration: up to 16 for each thread of Triton's 4 warps."""


def _launch_above(pre: Tensor, threshold: Tensor, by: By, *lists: Tensor | None) -> None:
    """Count without `values` among the lists; otherwise list."""
    (N, F), (_, values, _) = pre.shape, lists
    launch(
        _above_kernel,
        (N,),
        *(pre, threshold, *lists, F),
        BLOCK=min(BLOCK, power_of_2(F)),
        ABS=by == "abs",
        LIST=values is not None,
    )


def launch_count(pre: Tensor, threshold: Tensor, by: By) -> Tensor:
    """Number of entries above the threshold in each row: [N]"""
    count = torch.empty(len(pre), dtype=torch.int64, device=pre.device)
    _launch_above(pre, threshold, by, count, None, None)
    return count


def launch_list(
    pre: Tensor, threshold: Tensor, by: By, first: Tensor, M: int
) -> tuple[Tensor, Tensor]:
    """All M entries above the threshold and their positions; `first` [N] is where rows start."""
    values = pre.new_empty(M)
    position = torch.empty(M, dtype=torch.int64, device=pre.device)
    _launch_above(pre, threshold, by, first, values, position)
    return values, position
