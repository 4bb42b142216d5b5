"""A checksum of settings and tensors that are saved together."""

import json
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

CHECKSUM = "crc32"
"""Setting that holds the checksum of the other settings and the tensors."""


def sealed(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The settings with a checksum of themselves and the tensors."""
    return {**settings, CHECKSUM: _checksum(settings, tensors)}


def is_sealed(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """Whether settings and tensors are those that were sealed together. Without a checksum and a
    version, as older versions wrote them, nothing is compared."""
    others = {name: value for name, value in settings.items() if name != CHECKSUM}
    if CHECKSUM not in settings:
        return "version" not in settings
    return settings[CHECKSUM] == _checksum(others, tensors)


def _checksum(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """CRC-32 in hex, whatever the order of names and the layout of files."""
    found = zlib.crc32(json.dumps(settings, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), found)
        found = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, found)
    return f"{found:08x}"
