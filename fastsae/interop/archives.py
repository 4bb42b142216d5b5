"""Tensors of .pt and .npz archives, without unpickling: sizes are checked before anything is read.

Both are zip files. What they hold may be no more than MOST_EXPANSION times their bytes on disk, so
that the size of a file bounds the memory it takes.
"""

import pickletools
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

MOST_EXPANSION = 20
MOST_PICKLE = 1 << 20
"""Bytes of the part of a .pt file that says which tensors there are."""

GLOBALS = {
    "collections OrderedDict",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor_v2",
    *(
        f"torch {name}Storage"
        for name in ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Bool")
    ),
}
"""All that a state dict is made of; torch's own list of what is safe also makes large objects."""


def check_archive(path: Path) -> int:
    """The bytes that an archive holds; ValueError for a file that is missing, no zip file, or one
    that expands too much."""
    try:
        with zipfile.ZipFile(path) as archive:
            holds = sum(entry.file_size for entry in archive.infolist())
    except (FileNotFoundError, IsADirectoryError):
        raise ValueError(f"{path} does not exist") from None
    except Exception as error:  # damage shows as any of a dozen types
        raise ValueError(f"{path} is not a zip archive of tensors: {error}") from None
    if holds > MOST_EXPANSION * path.stat().st_size:
        raise ValueError(f"{path} holds {holds} bytes in a file of {path.stat().st_size}")
    return holds


def read_pt(path: Path) -> dict[str, Any]:
    """A dictionary of tensors and plain values by name that torch.save wrote.

    ValueError for anything else, such as one with objects that only unpickling would make.
    """
    holds = check_archive(path)
    try:
        check_pickle(path)
        # mmap: storages are then slices of the file, so that none can claim more than is there
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
            raise ValueError("it is no dictionary of names")
        tensors = [value for value in found.values() if isinstance(value, Tensor)]
        if sum(t.numel() * t.itemsize for t in tensors) > 2 * holds:  # some may be there twice
            raise ValueError("its tensors are larger than the file")
        return {n: t.clone() if isinstance(t, Tensor) else t for n, t in found.items()}
    except Exception as error:  # damage shows as any of a dozen types, in torch and in pickle
        text = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is not a state dict of tensors alone: {text}") from None


def check_pickle(path: Path) -> None:
    """ValueError unless the file's pickle speaks of GLOBALS only."""
    with zipfile.ZipFile(path) as archive:
        (entry,) = [e for e in archive.infolist() if e.filename.endswith("/data.pkl")]
        if entry.file_size > MOST_PICKLE:
            raise ValueError(f"{entry.filename} has {entry.file_size} bytes")
        for opcode, argument, _ in pickletools.genops(archive.read(entry)):
            if opcode.name in ("STACK_GLOBAL", "INST", "BYTEARRAY8", "EXT1", "EXT2", "EXT4"):
                raise ValueError(f"it holds {opcode.name}")
            if opcode.name == "GLOBAL" and argument not in GLOBALS:
                raise ValueError(f"it holds {argument}")


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
            except Exception as error:  # damage shows as any of a dozen types
                text = f"{path}: {entry.filename} is not a whole array of numbers: {error}"
                raise ValueError(text) from None
    return tensors


def check_array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
    """ValueError unless the entry's header speaks of as many bytes as follow it."""
    with archive.open(entry) as file:
        if np.lib.format.read_magic(file) == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        else:
            shape, _, dtype = np.lib.format.read_array_header_2_0(file)
        size = dtype.itemsize
        for length in shape:
            size *= length
        if dtype.hasobject or size != entry.file_size - file.tell():
            raise ValueError(f"shape {shape} of {dtype} in {entry.file_size} bytes")
