"""A checksum of settings and tensors that are saved together.

It is a CRC-32, as that of a whole follows from those of its parts: several processes can each take
that of what they write or read.
"""

import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

CHECKSUM = "crc32"
"""Setting that holds the checksum of the other settings and the tensors."""

PIECE = 1 << 23
"""Bytes that are copied, written or read at once."""

POLYNOMIAL = 0xEDB88320
"""Of CRC-32. The highest bit of a 32-bit number is the coefficient of x^0."""


class Content(NamedTuple):
    """What a checksum needs to know of a tensor."""

    dtype: torch.dtype
    shape: Sequence[int]
    crc32: int
    """Of its bytes."""

    @classmethod
    def of(cls, tensor: Tensor) -> "Content":
        found = 0
        for piece in pieces(tensor):
            found = zlib.crc32(piece, found)
        return cls(tensor.dtype, tensor.shape, found)

    @property
    def size(self) -> int:
        """Number of its bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def pieces(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor on any device, a few rows at a time, of at most PIECE bytes if there
    are several."""
    rows = torch.atleast_1d(tensor.detach())
    size = math.prod(rows.shape[1:]) * rows.dtype.itemsize
    for few in rows.split(max(PIECE // max(size, 1), 1)):
        yield few.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def sealed(
    settings: Mapping[str, Any], tensors: Mapping[str, Tensor] | Mapping[str, Content]
) -> dict[str, Any]:
    """The settings with a checksum of themselves and the tensors."""
    return {**settings, CHECKSUM: _checksum(settings, tensors)}


def is_sealed(
    settings: Mapping[str, Any], tensors: Mapping[str, Tensor] | Mapping[str, Content]
) -> bool:
    """Whether settings and tensors are those that were sealed together. Without a checksum and a
    version, as older versions wrote them, nothing is compared."""
    others = {name: value for name, value in settings.items() if name != CHECKSUM}
    if CHECKSUM not in settings:
        return "version" not in settings
    return settings[CHECKSUM] == _checksum(others, tensors)


def _checksum(
    settings: Mapping[str, Any], tensors: Mapping[str, Tensor] | Mapping[str, Content]
) -> str:
    """CRC-32 in hex, whatever the order of names and the layout of files."""
    found = zlib.crc32(json.dumps(settings, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name]
        content = Content.of(value) if isinstance(value, Tensor) else value
        found = zlib.crc32(f"{name} {content.dtype} {list(content.shape)}".encode(), found)
        found = joined_crc32(found, content.crc32, content.size)
    return in_hex(found)


def in_hex(crc32: int) -> str:
    """As files record it."""
    return f"{crc32:08x}"


def joined_crc32(first: int, second: int, size: int) -> int:
    """The CRC-32 of two parts in a row, from those of each and the bytes of the second."""
    return _product(_zeros(size), first) ^ second


@cache
def _zeros(size: int) -> int:
    """x^(8 size): what as many zero bytes multiply a CRC-32 by."""
    power, square = 1 << 31, 1 << 23  # x^0, and x^8 for one byte
    while size:
        if size & 1:
            power = _product(power, square)
        square, size = _product(square, square), size >> 1
    return power


def _product(one: int, other: int) -> int:
    """Of two polynomials over GF(2), modulo POLYNOMIAL."""
    found = 0
    for bit in range(31, -1, -1):
        if one >> bit & 1:
            found ^= other
        other = other >> 1 ^ (POLYNOMIAL if other & 1 else 0)
    return found
