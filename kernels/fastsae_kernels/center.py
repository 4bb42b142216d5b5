"""Center activations, and compute their total variance in the same pass.

    centered[n] = x[n] - b
    variance    = sum_n |x[n] - mean|^2         mean = sum_n x[n] / N

b is the decoder's bias, close but not equal to the mean. The variance is the denominator of the
FVU.
Shapes: N tokens, D width. Sums are in fp32 (fp64 for fp64 x), in a fixed order.
"""

import torch
from torch import Tensor

from ._launch import check_devices, check_shape, use_triton, wide_dtype

# --- reference: the specification -----------------------------------------------------------


def center_reference(x: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[N, D], [D] -> [N, D] in dtype, []"""
    wide = x.to(wide_dtype(x))
    return (wide - b).to(dtype), (wide - wide.mean(0)).square().sum()


# --- torch path: what runs without a GPU ----------------------------------------------------


def _center_torch(x: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    wide = x.to(wide_dtype(x))
    mean = wide.mean(0)
    centered = wide - mean
    # Row by row: the norm of the whole tensor at once would lose four digits.
    variance = torch.linalg.vector_norm(centered, dim=1).square().sum()
    variance = nonzero_variance(variance, mean, len(x))
    return torch.sub(wide, b, out=centered).to(dtype), variance


def nonzero_variance(variance: Tensor, mean: Tensor, N: int) -> Tensor:
    """The total variance of N rows, or 0 if it is no more than what rounding their mean gives.

    Where both overflow, it stays Inf.
    """
    rounding = N * (4 * torch.finfo(mean.dtype).eps * mean).square().sum()
    return torch.where((variance <= rounding) & variance.isfinite(), 0.0, variance)


# --- for training steps ---------------------------------------------------------------------


@torch.no_grad()
def center(x: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns x - b and the total variance of x.

    x [N, D] and b [D] floating -> [N, D] in dtype, and a scalar in fp32 (fp64 for fp64 x), which is
    accurate even if the mean of x is large. Not differentiable. Deterministic.

    Reads x once on a GPU, costs 9 N D FLOPs. ValueError for wrong shapes or dtypes.
    """
    check_shape("x", x, None, None)
    check_shape("b", b, x.shape[1])
    check_devices(x=x, b=b)
    if not (use_triton(x) and x.numel()):
        return _center_torch(x, b, dtype)
    from ._center_kernel import launch_center

    return launch_center(x.contiguous(), b.contiguous(), dtype)
