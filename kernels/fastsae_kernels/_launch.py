"""Shared by all ops: when to run a Triton kernel, how much memory to use, and argument checks."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
_BUFFER_MB = os.environ.get("FASTSAE_BUFFER_MB")
ENCODER = os.environ.get("FASTSAE_ENCODER")
"""Overrides encode.py's choice of the GEMM on a GPU: "cublas" or "triton"."""
if ENCODER not in (None, "cublas", "triton"):
    raise ValueError(f'FASTSAE_ENCODER must be "cublas" or "triton", got {ENCODER!r}')

CPU_PRODUCT = os.environ.get("FASTSAE_CPU_PRODUCT")
"""Overrides product.py's choice of library and chunk size on a CPU: "mkl:1024", "onednn:256"."""

CPU_BF16 = os.environ.get("FASTSAE_CPU_BF16")
"""Overrides proof.py's choice of the GEMM on a CPU: "1" is bfloat16, "0" fp32."""
if CPU_BF16 not in (None, "0", "1"):
    raise ValueError(f"FASTSAE_CPU_BF16 must be 0 or 1, got {CPU_BF16!r}")

_local = threading.local()


def use_triton(x: Tensor) -> bool:
    """Whether to run Triton kernels: on CUDA tensors, and on CPU tensors inside `interpreted()`.

    Raises ValueError if they should run but Triton is not installed. Ops call this before they
    import a kernel's module, so that CPU paths work without Triton.
    """
    wanted = x.is_cuda or getattr(_local, "interpreted", False)
    if wanted and not HAS_TRITON:
        raise ValueError(
            "CUDA tensors need Triton, which is not installed: pip install 'triton>=3.6' "
            "(on Windows, triton-windows), or use the CPU"
        )
    return wanted


@contextmanager
def interpreted() -> Iterator[None]:
    """Run Triton kernels on CPU tensors through Triton's interpreter, for tests.

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


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Run a Triton kernel on the device of its first tensor, unless the grid is empty."""
    if 0 in grid:
        return
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*arguments, **options)


def capability(x: Tensor) -> tuple[int, int]:
    """Compute capability of x's GPU; that of Hopper if a kernel is only interpreted or compiled."""
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (9, 0)


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype that ops compute and accumulate in: float32, or float64 for float64 inputs."""
    return torch.promote_types(x.dtype, torch.float32)


def power_of_2(n: int) -> int:
    """The smallest power of two >= n."""
    return 1 << max(n - 1, 0).bit_length()


@cache
def _gpu_bytes(device: torch.device) -> int:
    """Memory of a GPU. Reading it does not wait for queued work."""
    return torch.cuda.get_device_properties(device).total_memory


def buffer_bytes(device: torch.device) -> int:
    """Budget for pre-activations that exist at a time: FASTSAE_BUFFER_MB if set.

    Otherwise 256 MB on a CPU, and on a GPU 1/32 of its memory, at least 512 MB. Each chunk's GEMM
    reads all of W_enc: with 1 M latents, 512 MB hold 256 tokens, so that 4,096 tokens would read
    W_enc 16 times. 4.4 GB, 1/32 of an H200, hold 2,048 tokens: two reads.
    """
    if _BUFFER_MB is not None:
        return int(_BUFFER_MB) << 20
    if device.type == "cpu":
        return 256 << 20
    return max(512 << 20, _gpu_bytes(device) // 32 if device.type == "cuda" else 0)


def rows_at_a_time(x: Tensor, F: int, least: int = 256) -> int:
    """Chunk size for work on x's rows that needs F entries of x's dtype per row.

    Gives the fewest chunks of equal size that fit the budget. On a GPU, sizes are multiples of GEMM
    tiles if these fit as well; on a CPU, chunks of 8 MB stay in the cache, but have at least
    `least` rows.
    """
    row = max(1, F * x.element_size())
    most = max(1, buffer_bytes(x.device) // row)
    if x.device.type == "cpu":
        most = min(most, max(least, (8 << 20) // row))
    if len(x) <= most:
        return max(1, len(x))
    rows = -(-len(x) // -(-len(x) // most))
    if x.device.type != "cpu":
        tiled = (-(-rows // tile) * tile for tile in (256, 128))
        rows = next((size for size in tiled if size <= most), rows)
    return rows


def check_codes(values: Tensor | None, indices: Tensor) -> None:
    """Raise ValueError unless indices are integers of shape [N, K] and values match them."""
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


def check_devices(**tensors: Tensor | None) -> None:
    """Raise ValueError naming the first argument that is on another device than the first one."""
    (first, like), *others = ((name, t) for name, t in tensors.items() if t is not None)
    for name, tensor in others:
        if tensor.device != like.device:
            raise ValueError(
                f"{name} must be on the device of {first}, {like.device}, got {tensor.device}"
            )


def check_indices(indices: Tensor, F: int) -> None:
    """Raise ValueError unless all indices are in [0, F).

    Only on a CPU, where reading them is cheap; on a GPU, kernels treat missing rows as zeros.
    """
    if indices.numel() and indices.device.type == "cpu":
        low, high = indices.aminmax()
        if low < 0 or high >= F:
            raise ValueError(f"indices must lie in [0, {F}), got {int(low)} to {int(high)}")


def check_shape(name: str, x: Tensor, *shape: int | None) -> None:
    """Raise ValueError naming the argument unless x is floating point of this shape (None: any)."""
    fits = x.dim() == len(shape) and all(
        size in (None, given) for size, given in zip(shape, x.shape, strict=True)
    )
    if not fits or not x.is_floating_point():
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(
            f"{name} must be floating point of shape [{wanted}], "
            f"got {x.dtype} of shape {list(x.shape)}"
        )
