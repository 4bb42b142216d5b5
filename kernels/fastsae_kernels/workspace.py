"""Memory that is used again at every step."""

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from ._launch import BUFFER_MB

_local = threading.local()


def buffer(name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor: on a CPU, each name's is always the same memory, one per thread.

    Its content lasts until the name is asked for again. Fresh memory costs a page fault per 4 KB,
    which can be a tenth of the time of the product that fills it. CUDA's caching allocator has no
    such cost, so there the tensor is a new one.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    memory = vars(_local).get(name)
    if memory is None or memory.numel() < size:
        memory = torch.empty(size, dtype=torch.uint8)
        setattr(_local, name, memory)
    return memory[:size].view(dtype).view(shape)


def buffer_bytes(device: torch.device) -> int:
    """How large a buffer of pre-activations may be: FASTSAE_BUFFER_MB, or 512 MB (CPU: 256 MB)."""
    if BUFFER_MB is not None:
        return int(BUFFER_MB) << 20
    return (256 if device.type == "cpu" else 512) << 20
