"""Where to compute."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Device = Literal["auto", "cpu", "cuda"]


def choose_device(device: Device) -> Literal["cpu", "cuda"]:
    """What was asked for, auto being a GPU if there is one; ValueError if there is none to ask."""
    gpu = torch.cuda.is_available()
    if device == "cuda" and not gpu:
        raise ValueError("device is cuda, but there is no CUDA GPU here: use cpu or auto")
    if device == "auto":
        return "cuda" if gpu else "cpu"
    return device


@contextmanager
def tf32_products(allowed: bool) -> Iterator[None]:
    """Let a GPU round the inputs of float32 products to tf32, or not, for a while."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before
