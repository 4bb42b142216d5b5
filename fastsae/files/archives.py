"""Reads tensors from .pt and .npz files without unpickling objects.

Both are zip archives. Their contents may be at most MAX_EXPANSION times as large as the file, which
is checked before anything is read: the size of a file bounds the memory that reading it takes.
"""

import io
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .headers import array_header
from .pickles import parse_pickle
from .read import open_file

MAX_EXPANSION = 20
MAX_DIRECTORY = 1 << 20
"""Bytes read at once, and so of an archive's directory, which zipfile reads whole."""

COMPRESSIONS = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
"""The others expand without a limit on what is read at once."""


class _Limited(io.FileIO):
    """A file from which at most MAX_DIRECTORY bytes are read at once."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_DIRECTORY:
            raise ValueError(f"its directory has {size} bytes")
        return super().read(size) or b""


@contextmanager
def open_archive(path: Path) -> Iterator[tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]]:
    """A zip archive and its entries by name; ValueError for anything else, and for one that is
    damaged or expands too much, also while it is read."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            with (
                _Limited(file.fileno(), closefd=False) as limited,
                zipfile.ZipFile(limited) as archive,
            ):
                entries = {entry.filename: entry for entry in archive.infolist()}
                if len(entries) < len(archive.infolist()):
                    raise ValueError("two of its entries have the same name")
                if any(entry.compress_type not in COMPRESSIONS for entry in entries.values()):
                    raise ValueError("it is compressed by another method than deflate")
                claimed = sum(entry.file_size for entry in entries.values())
                if claimed > MAX_EXPANSION * size:
                    raise ValueError(f"it holds {claimed} bytes in a file of {size}")
                yield archive, entries
        except Exception as error:  # damage shows as any of a dozen types
            text = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(f"{path} is not a zip archive of plain tensors: {text}") from None


def contents(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytearray:
    """The bytes of an entry, compared with its size and its checksum. They are read piece by piece,
    as zipfile expands all of a piece, whatever the size that the directory claims."""
    found = bytearray()
    with archive.open(entry) as file:
        while piece := file.read(MAX_DIRECTORY):
            found += piece
    if len(found) != entry.file_size:
        raise ValueError(f"{entry.filename} has {len(found)} bytes, not {entry.file_size}")
    return found


def read_pt(path: Path) -> dict[str, Any]:
    """The tensors and plain values by name in a dictionary that torch.save wrote.

    ValueError for anything else, such as other objects.
    """
    return _saved(path, dict)


def read_pt_tensor(path: Path) -> Tensor:
    """The tensor that torch.save wrote to a file of its own; ValueError for anything else."""
    return _saved(path, Tensor)


def _saved(path: Path, kind: type) -> Any:
    with open_archive(path) as (archive, entries):
        pickle = next((name for name in entries if name.endswith("/data.pkl")), None)
        if pickle is None:
            raise ValueError("it has no data.pkl")
        folder = pickle.removesuffix("data.pkl")
        order = entries.get(f"{folder}byteorder")
        if order is not None and contents(archive, order) != b"little":
            raise ValueError("its numbers are not in little-endian order")

        def storage(key: str, dtype: torch.dtype, count: int) -> Tensor:
            found = contents(archive, entries[f"{folder}data/{key}"])
            if len(found) != count * dtype.itemsize:
                raise ValueError(f"{count} {dtype} in a storage of {len(found)} bytes")
            return torch.frombuffer(found, dtype=dtype) if found else torch.empty(0, dtype=dtype)

        return parse_pickle(contents(archive, entries[pickle]), storage, kind)


def read_npz(path: Path) -> dict[str, Tensor]:
    """The arrays of an .npz file; ValueError if it is damaged or holds objects."""
    with open_archive(path) as (archive, entries):
        return {
            name.removesuffix(".npy"): _array(name, contents(archive, entry))
            for name, entry in entries.items()
        }


def _array(name: str, content: bytearray) -> Tensor:
    try:
        header = array_header(bytes(content[: 1 << 16]))
        size = len(content) - header.offset
        if header.size != size:
            raise ValueError(f"shape {header.shape} of {header.dtype} in {size} bytes")
        return torch.from_numpy(header.array(content))
    except Exception as error:  # also of a dtype that torch lacks
        raise ValueError(f"{name} is not a complete numeric array: {error}") from None
