"""What every launcher needs: when to run a kernel, how much memory to use, how to check inputs."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
_BUFFER_MB = os.environ.get("FASTSAE_BUFFER_MB")

_local = threading.local()


def use_triton(x: Tensor) -> bool:
    """Kernels run on CUDA tensors, and on CPU tensors inside `interpreted()`."""
    return x.is_cuda or getattr(_local, "interpreted", False)


@contextmanager
def interpreted() -> Iterator[None]:
    """Run Triton kernels on CPU tensors, through Triton's interpreter (tests).

    Needs TRITON_INTERPRET=1 in the environment before triton is first imported.
    """
    if not INTERPRET:
        raise ValueError("set TRITON_INTERPRET=1 before importing fastsae_kernels")
    outer = getattr(_local, "interpreted", False)
    _local.interpreted = True
    try:
        yield
    finally:
        _local.interpreted = outer


def power_of_2(n: int) -> int:
    """The least power of two that is no less than n."""
    return 1 << max(n - 1, 0).bit_length()


def buffer_bytes(device: torch.device) -> int:
    """How many pre-activations may exist at a time: FASTSAE_BUFFER_MB, or 512 MB (CPU: 256 MB)."""
    if _BUFFER_MB is not None:
        return int(_BUFFER_MB) << 20
    return (256 if device.type == "cpu" else 512) << 20


def rows_in_cache(F: int, itemsize: int) -> int:
    """How many rows of F entries a CPU works on at a time: 8 MB, but no fewer than 256."""
    return max(256, (8 << 20) // (F * itemsize))


def check_codes(values: Tensor | None, indices: Tensor, F: int) -> None:
    """Raise ValueError unless indices are integers of shape [N, K] and values match them.

    On a CPU, where it costs nothing, indices must also lie below F.
    """
    if indices.dim() != 2 or indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"indices must be int32 or int64 of shape [N, K], "
            f"got {indices.dtype} of shape {list(indices.shape)}"
        )
    if values is not None and (values.shape != indices.shape or not values.is_floating_point()):
        raise ValueError(
            f"values must be floating point of the shape of indices, {list(indices.shape)}, "
            f"got {values.dtype} of shape {list(values.shape)}"
        )
    if indices.numel() and indices.device.type == "cpu":
        low, high = indices.aminmax()
        if low < 0 or high >= F:
            raise ValueError(f"indices must lie in [0, {F}), got {int(low)} to {int(high)}")


def check_matrix(name: str, x: Tensor, rows: int | None = None, columns: int | None = None) -> None:
    """Raise ValueError naming the argument unless x is a floating matrix of the given size."""
    wanted = [rows if rows is not None else "any", columns if columns is not None else "any"]
    right = x.dim() == 2 and rows in (None, x.shape[0]) and columns in (None, x.shape[1])
    if not right or not x.is_floating_point():
        raise ValueError(
            f"{name} must be floating point of shape [{wanted[0]}, {wanted[1]}], "
            f"got {x.dtype} of shape {list(x.shape)}"
        )
