"""Reads tensors from .pt and .npz files without unpickling objects.

Both are zip archives. Their contents may be at most MAX_EXPANSION times as large as the file, which
is checked before anything is read: the size of a file bounds the memory that reading it takes.
"""

import pickletools
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAX_EXPANSION = 20
MAX_PICKLE = 1 << 20
"""Bytes of the pickle in a .pt file, which only lists its tensors."""

GLOBALS = {
    "collections OrderedDict",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor_v2",
    *(
        f"torch {name}Storage"
        for name in ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Bool")
    ),
}
"""What a state dict may refer to; torch's own safe list also contains types that allocate."""


def check_archive(path: Path) -> int:
    """The uncompressed size of an archive in bytes; ValueError if it is missing, not a zip file, or
    expands too much."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
    except (FileNotFoundError, IsADirectoryError):
        raise ValueError(f"{path} does not exist") from None
    except Exception as error:  # damage shows as any of a dozen types
        raise ValueError(f"{path} is not a zip archive of tensors: {error}") from None
    if size > MAX_EXPANSION * path.stat().st_size:
        raise ValueError(f"{path} holds {size} bytes in a file of {path.stat().st_size}")
    return size


def read_pt(path: Path) -> dict[str, Any]:
    """The tensors and plain values by name in a dictionary that torch.save wrote.

    ValueError for anything else, such as other objects.
    """
    size = check_archive(path)
    try:
        check_pickle(path)
        # mmap: storages are slices of the file, so none can claim more than it holds
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
            raise ValueError("it is not a dictionary with string keys")
        tensors = [value for value in found.values() if isinstance(value, Tensor)]
        if sum(t.numel() * t.itemsize for t in tensors) > 2 * size:  # tied weights count twice
            raise ValueError("its tensors are larger than the file")
        return {n: t.clone() if isinstance(t, Tensor) else t for n, t in found.items()}
    except Exception as error:  # damage shows as any of a dozen types, in torch and in pickle
        text = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is not a plain state dict of tensors: {text}") from None


def check_pickle(path: Path) -> None:
    """ValueError if the file's pickle refers to anything but GLOBALS."""
    with zipfile.ZipFile(path) as archive:
        (entry,) = [e for e in archive.infolist() if e.filename.endswith("/data.pkl")]
        if entry.file_size > MAX_PICKLE:
            raise ValueError(f"{entry.filename} has {entry.file_size} bytes")
        for opcode, argument, _ in pickletools.genops(archive.read(entry)):
            if opcode.name in ("STACK_GLOBAL", "INST", "BYTEARRAY8", "EXT1", "EXT2", "EXT4"):
                raise ValueError(f"it holds {opcode.name}")
            if opcode.name == "GLOBAL" and argument not in GLOBALS:
                raise ValueError(f"it holds {argument}")


def read_npz(path: Path) -> dict[str, Tensor]:
    """The arrays of an .npz file; ValueError if it is damaged or holds objects."""
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
                text = f"{path}: {entry.filename} is not a complete numeric array: {error}"
                raise ValueError(text) from None
    return tensors


def check_array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
    """ValueError unless the entry's header declares as many bytes as follow it."""
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
