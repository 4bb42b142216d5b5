"""Memory-mapped arrays from safetensors and .npy files."""

import math
import mmap
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastsae.files import array_header, open_file, read_header, shown
from fastsae.files.headers import Entry

FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_NUMPY = {name: name for name in FLOATS.values()} | {"bfloat16": "uint16", "int32": "int32"}


class Mapped(NamedTuple):
    """A mapped array. numpy has no bfloat16: such an array holds the bits as uint16."""

    array: np.ndarray
    dtype: str
    memory: mmap.mmap

    def copy(self, rows: np.ndarray, out: np.ndarray, places: np.ndarray) -> None:
        """`out[places] = array[rows]`, releasing pages on the way: each page fault maps a whole
        neighborhood, so scattered reads would otherwise make most of the file resident."""
        for start in range(0, len(rows), 1024):
            part = slice(start, start + 1024)
            out[places[part]] = self.array[rows[part]]
            if hasattr(mmap, "MADV_DONTNEED"):  # POSIX only
                self.memory.madvise(mmap.MADV_DONTNEED)


def to_float32(stored: np.ndarray, dtype: str) -> np.ndarray:
    """The values of a mapped array as float32."""
    if dtype == "bfloat16":  # the upper half of a float32
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32, copy=False)


def map_safetensors(path: Path) -> dict[str, Mapped]:
    """Map all tensors of a safetensors file, after checking its header against its length."""
    entries = read_header(path)
    memory = map_file(path)
    return {name: _tensor(path, memory, name, entry) for name, entry in entries.items()}


def map_file(path: Path) -> mmap.mmap:
    with open_file(path) as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _tensor(path: Path, memory: mmap.mmap, name: str, entry: Entry) -> Mapped:
    dtype, shape, start, stop = entry
    known = {**FLOATS, "I32": "int32"}.get(dtype)
    if known is None:
        allowed = ", ".join([*FLOATS, "I32"])
        raise ValueError(f"{path}: {shown(name)} has dtype {shown(dtype)}, allowed are {allowed}")
    stored, count = np.dtype(_NUMPY[known]), math.prod(shape)
    if stop - start != count * stored.itemsize:
        held = f"{stop - start} bytes of {known}"
        raise ValueError(f"{path}: {shown(name)} has shape {shape} but {held}")
    array = np.frombuffer(memory, stored, count, start) if count else np.empty(0, stored)
    return Mapped(array.reshape(shape), known, memory)


def map_npy(path: Path) -> Mapped:
    """Map the array of an .npy file."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        beginning = file.read(1 << 16)
    try:
        header = array_header(beginning)
        if header.size > size - header.offset:
            raise ValueError(f"{header.size} bytes expected, {size - header.offset} found")
    except ValueError as error:
        raise ValueError(f"{path}: not a valid .npy file of numbers: {error}") from None
    if str(header.dtype) not in _NUMPY or header.dtype.kind != "f":
        allowed = "float16, float32, float64"
        raise ValueError(f"{path}: holds dtype {header.dtype}, allowed are {allowed}")
    memory = map_file(path)
    return Mapped(header.array(memory), str(header.dtype), memory)
