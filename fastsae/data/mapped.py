"""Memory-mapped arrays from safetensors and .npy files."""

import json
import mmap
from pathlib import Path
from typing import NamedTuple

import numpy as np

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
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise ValueError(f"{path}: not a complete safetensors file ({size} bytes)")
        try:
            header = json.loads(file.read(length))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            stops = [entry["data_offsets"][1] for entry in entries.values()]
            end = 8 + length + max(stops, default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{path}: the safetensors header cannot be read") from error
        if size != end:
            raise ValueError(f"{path}: {end} bytes expected from its header, {size} found")
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return {name: _tensor(path, memory, 8 + length, name, entry) for name, entry in entries.items()}


def _tensor(path: Path, memory: mmap.mmap, base: int, name: str, entry: dict) -> Mapped:
    dtype = {**FLOATS, "I32": "int32"}.get(entry["dtype"])
    shape, (start, stop) = entry["shape"], entry["data_offsets"]
    if dtype is None:
        allowed = ", ".join([*FLOATS, "I32"])
        raise ValueError(f"{path}: {name} has dtype {entry['dtype']}, allowed are {allowed}")
    stored = np.dtype(_NUMPY[dtype])
    count = int(np.prod(shape, dtype=np.int64))
    if not 0 <= start <= stop or stop - start != count * stored.itemsize:
        raise ValueError(f"{path}: {name} has shape {shape} but {stop - start} bytes of {dtype}")
    array = np.frombuffer(memory, stored, count, base + start) if count else np.empty(0, stored)
    return Mapped(array.reshape(shape), dtype, memory)


def map_npy(path: Path) -> Mapped:
    """Map the array of an .npy file."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: not a valid .npy file of numbers: {error}") from error
    if not isinstance(array, np.memmap):
        raise ValueError(f"{path}: not an .npy file")
    if str(array.dtype) not in _NUMPY or array.dtype.kind != "f":
        allowed = "float16, float32, float64"
        raise ValueError(f"{path}: holds dtype {array.dtype}, allowed are {allowed}")
    order = "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    flat = np.frombuffer(memory, array.dtype, array.size, array.offset)
    return Mapped(flat.reshape(array.shape, order=order), str(array.dtype), memory)
