"""Where to compute."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def check_device(device: str) -> None:
    """ValueError unless it is auto, cpu, cuda, or a GPU's number as cuda:1."""
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", device):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}")


def choose_device(device: str) -> str:
    """The device asked for; auto is a GPU if there is one. ValueError if there is none to ask.

    A GPU that is named by its number becomes torch's current one: CUDA graphs are captured there.
    """
    check_device(device)
    available = torch.cuda.is_available()
    if device == "auto":
        return "cuda" if available else "cpu"
    if device != "cpu" and not available:
        raise ValueError(f"device is {device}, but there is no CUDA GPU here: use cpu or auto")
    _, _, number = device.partition(":")
    if number and int(number) >= (gpus := torch.cuda.device_count()):
        raise ValueError(
            f"device must be below cuda:{gpus}, as there are {gpus} GPUs, got {device}"
        )
    if number:
        torch.cuda.set_device(device)
    return device


@contextmanager
def same_gpu() -> Iterator[None]:
    """Afterwards, torch's current GPU is the one from before."""
    before = torch.cuda.current_device() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        if before is not None:
            torch.cuda.set_device(before)


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
