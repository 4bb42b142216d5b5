"""Headers of safetensors and .npy files, checked before anything is mapped or allocated."""

import io
import math
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .read import open_file, parse_json, shown

MAX_HEADER_BYTES = 1 << 20
"""Length of a safetensors header; those of SAEs and shards have a few kB."""

MAX_DIMENSIONS = 8


class Entry(NamedTuple):
    """A tensor in a safetensors file."""

    dtype: str
    shape: list[int]
    start: int
    """Offset of its first byte in the file."""
    stop: int


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file by name, in the order of their bytes.

    ValueError unless their bytes are the rest of the file, without gaps and overlaps.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise ValueError(f"{path} is not a complete safetensors file: it has {size} bytes")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"{path}: its safetensors header has {length} bytes")
        content = file.read(length)
    base = end = 8 + length
    try:
        header = parse_json(content)
        if not isinstance(header, dict):
            raise ValueError("it is not an object")
        header.pop("__metadata__", None)
        found = {name: _entry(name, value, base) for name, value in header.items()}
    except ValueError as error:
        raise ValueError(f"{path}: the safetensors header cannot be read: {error}") from None
    found = dict(sorted(found.items(), key=lambda item: item[1][2:]))
    for name, entry in found.items():
        if entry.start != end:
            raise ValueError(
                f"{path}: {shown(name)} begins at byte {entry.start}, expected was {end}"
            )
        end = entry.stop
    if size != end:
        raise ValueError(
            f"{path} is not a complete safetensors file: "
            f"{end} bytes expected from its header, {size} found"
        )
    return found


def _entry(name: str, value: Any, base: int) -> Entry:
    match value:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(stop)]}:
            sizes = is_shape(shape) and is_shape([start]) and is_shape([stop]) and start <= stop
            if sizes and len(dtype) < 16:  # the library repeats an unknown one in its error
                return Entry(dtype, shape, base + start, base + stop)
    raise ValueError(f"{shown(name)} is {shown(value)}")


def is_shape(values: Sequence[Any]) -> bool:
    """Whether values are sizes of a few dimensions, small enough for any library: numpy multiplies
    the others also if one is 0."""
    sizes = len(values) <= MAX_DIMENSIONS and all(type(v) is int and v >= 0 for v in values)
    return sizes and math.prod(v or 1 for v in values) < 2**48


def read_tensors(
    path: Path, rows: slice = slice(None), of: Collection[str] = ()
) -> dict[str, Tensor]:
    """All tensors of a safetensors file, mapped, with only some rows of those that `of` names; a
    ValueError names the file if it is missing or damaged."""
    read_header(path)  # the library would read 100 MB of header, and skips duplicate names
    try:
        with safe_open(path, framework="pt") as file:
            return {
                name: file.get_slice(name)[rows] if name in of else file.get_tensor(name)
                for name in file.keys()  # noqa: SIM118
            }
    except (SafetensorError, OSError, RuntimeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a complete safetensors file: {shown(str(error))}"
        ) from None


class ArrayHeader(NamedTuple):
    """What an .npy file says of its array."""

    shape: tuple[int, ...]
    order: Literal["C", "F"]
    dtype: np.dtype
    offset: int
    """Where its entries begin in the file."""

    @property
    def size(self) -> int:
        """Bytes of its entries."""
        return math.prod(self.shape) * self.dtype.itemsize

    def array(self, file: Any) -> np.ndarray:
        """The array as a view of the file's bytes."""
        flat = np.frombuffer(file, self.dtype, math.prod(self.shape), self.offset)
        return flat.reshape(self.shape, order=self.order)


def array_header(beginning: bytes) -> ArrayHeader:
    """The header of an .npy file from its first bytes (64 kB are enough for any); ValueError if it
    is damaged or of something else than an array of numbers."""
    file = io.BytesIO(beginning)
    read = np.lib.format
    try:
        version = read.read_magic(file)
        if version == (1, 0):
            shape, fortran, dtype = read.read_array_header_1_0(file)
        else:
            shape, fortran, dtype = read.read_array_header_2_0(file)
    except Exception as error:  # it is parsed as Python, so damage shows as any of a dozen types
        raise ValueError(f"not a valid .npy header: {shown(str(error))}") from None
    if dtype.kind not in "biufc" or not is_shape(shape):
        raise ValueError(f"not an .npy file of numbers: shape {shown(shape)} of {shown(dtype)}")
    return ArrayHeader(shape, "F" if fortran else "C", dtype, file.tell())
