"""Safetensors files that several processes write, or of which each reads a part."""

import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from .checksum import joined_crc32, pieces
from .headers import Entry
from .read import open_file

BUFFER = 1 << 18
"""Bytes that are read at once for their checksum: they stay in the processor's cache."""


class Layout(NamedTuple):
    """Where a safetensors file has what."""

    header: bytes
    entries: dict[str, Entry]
    """In the order of their bytes."""

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return max((entry.stop for entry in self.entries.values()), default=len(self.header))

    def crc32(self, parts: Mapping[str, int]) -> int:
        """The CRC-32 of the file, from that of each tensor's bytes."""
        found = zlib.crc32(self.header)
        for name, entry in self.entries.items():
            found = joined_crc32(found, parts[name], entry.stop - entry.start)
        return found


def layout_of(tensors: Mapping[str, Tensor], rows: Mapping[str, int]) -> Layout:
    """What safetensors itself writes for tensors like these, except that those named in `rows` have
    that number of rows. The order and the names of dtypes are the library's, for empty tensors."""
    empty = save({name: torch.empty(0, dtype=tensor.dtype) for name, tensor in tensors.items()})
    header, entries, stop = json.loads(empty[8:]), dict[str, Entry](), 0
    for name, about in header.items():
        shape = [*tensors[name].shape]
        shape[:1] = [rows.get(name, size) for size in shape[:1]]
        start, stop = stop, stop + math.prod(shape) * tensors[name].dtype.itemsize
        header[name] = {"dtype": about["dtype"], "shape": shape, "data_offsets": [start, stop]}
        entries[name] = Entry(about["dtype"], shape, start, stop)
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    moved = {n: e._replace(start=base + e.start, stop=base + e.stop) for n, e in entries.items()}
    return Layout(len(text).to_bytes(8, "little") + text, moved)


def create(path: Path, layout: Layout) -> None:
    """Write the header of a new file, which then has its final size."""
    with _named(path), open(path, "xb") as file:
        file.write(layout.header)
        file.truncate(layout.size)
        file.flush()
        os.fsync(file.fileno())


def write_rows(
    path: Path, layout: Layout, tensors: Mapping[str, Tensor], first: int
) -> dict[str, int]:
    """Write rows of some of the tensors of a file that `create` made, to the disk.

    Args:
        tensors: rows of each, on any device; at most PIECE bytes are copied at once.
        first: where in the whole tensors these rows begin.

    Returns the CRC-32 of each tensor's bytes.
    """
    found = dict.fromkeys(tensors, 0)
    # Not opened to read: a network file system that has read a page to change a part of it writes
    # all of it, over what another machine wrote there.
    with _named(path), open(path, "wb", opener=_existing) as file:
        for name, tensor in tensors.items():
            entry = layout.entries[name]
            rows = max(entry.shape[0], 1) if entry.shape else 1
            file.seek(entry.start + first * ((entry.stop - entry.start) // rows))
            for piece in pieces(tensor):
                found[name] = zlib.crc32(piece, found[name])
                file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return found


def _existing(path: str, flags: int) -> int:
    return os.open(path, flags & ~(os.O_CREAT | os.O_TRUNC))


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """OSErrors that name the file that cannot be written."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from None


class Extent(NamedTuple):
    """Bytes of a file, from start to stop."""

    path: Path
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def crc32(self) -> int:
        """Their CRC-32; ValueError if the file ends before them."""
        found, left, buffer = 0, self.size, memoryview(bytearray(min(self.size, BUFFER)))
        with open_file(self.path) as file:
            file.seek(self.start)
            while left:
                count = file.readinto(buffer[: min(left, len(buffer))])
                if not count:
                    raise ValueError(f"{self.path} is not complete: it lacks {left} bytes")
                found, left = zlib.crc32(buffer[:count], found), left - count
        return found


def share(extents: Sequence[Extent], part: int, parts: int) -> Iterator[Extent]:
    """What each extent has in one of several equal parts of all their bytes."""
    total = sum(extent.size for extent in extents)
    low, high, begin = part * total // parts, (part + 1) * total // parts, 0
    for path, start, stop in extents:
        size = stop - start
        inner = (start + min(max(edge - begin, 0), size) for edge in (low, high))
        yield Extent(path, *inner)
        begin += size
