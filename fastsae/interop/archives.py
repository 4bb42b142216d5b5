"""Tensors of .pt and .npz archives, without unpickling: sizes are checked before anything is read.

Both are zip files whose entries must not be compressed to a fraction of what they hold, so that
what is read needs about as much memory as there are bytes on disk.
"""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

MOST_EXPANSION = 20
"""Times the bytes on disk that an archive may hold."""


def check_archive(path: Path) -> None:
    """ValueError for a file that is missing, no zip file, or one that expands too much."""
    try:
        with zipfile.ZipFile(path) as archive:
            holds = sum(entry.file_size for entry in archive.infolist())
    except (FileNotFoundError, IsADirectoryError):
        raise ValueError(f"{path} does not exist") from None
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise ValueError(f"{path} is not a zip archive of tensors: {error}") from None
    if holds > MOST_EXPANSION * path.stat().st_size:
        raise ValueError(f"{path} holds {holds} bytes in a file of {path.stat().st_size}")


def read_pt(path: Path) -> dict[str, Any]:
    """A dictionary of tensors and plain values by name that torch.save wrote.

    ValueError for anything else, such as one with objects that only unpickling would make.
    """
    check_archive(path)
    try:
        # mmap: storages are then slices of the file, so that none can claim more than is there
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        copied = {n: t.clone() if isinstance(t, Tensor) else t for n, t in found.items()}
    except Exception as error:  # damage shows as any of a dozen types, in torch and in pickle
        text = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is not a state dict of tensors alone: {text}") from None
    if not all(isinstance(name, str) for name in copied):
        raise ValueError(f"{path} holds tensors without a name")
    return copied


def read_npz(path: Path) -> dict[str, Tensor]:
    """The arrays of an .npz file; ValueError for one that is damaged or holds objects."""
    check_archive(path)
    tensors = {}
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            try:
                check_array(archive, entry)
                with archive.open(entry) as file:
                    array = np.lib.format.read_array(file, allow_pickle=False)
                tensors[entry.filename.removesuffix(".npy")] = torch.from_numpy(array.copy())
            except (ValueError, TypeError, EOFError, OSError, zipfile.BadZipFile) as error:
                text = f"{path}: {entry.filename} is not a whole array of numbers: {error}"
                raise ValueError(text) from None
    return tensors


def check_array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
    """ValueError unless the entry's header speaks of as many bytes as follow it."""
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0}.get(version)
        if read is None:
            read = np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        size = dtype.itemsize
        for length in shape:
            size *= length
        if dtype.hasobject or size != entry.file_size - file.tell():
            raise ValueError(f"shape {shape} of {dtype} in {entry.file_size} bytes")
