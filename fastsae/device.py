"""Where to compute."""

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
