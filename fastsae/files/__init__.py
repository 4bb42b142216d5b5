"""JSON, safetensors, .npy, .npz and .pt files: written atomically, and read with nothing unpickled.

A file can claim anything. What it claims is compared with its length before memory is allocated,
and a file that is missing, damaged or truncated is one ValueError that names it.
"""

from .archives import read_npz, read_pt, read_pt_tensor
from .checksum import CHECKSUM, is_sealed, sealed
from .headers import ArrayHeader, array_header, is_shape, read_header, read_tensors
from .read import open_file, read_json, shown
from .write import (
    claimed,
    sync_directory,
    temporary_of,
    write_atomically,
    write_files,
    write_json,
    write_tensors,
)

__all__ = [
    "CHECKSUM",
    "ArrayHeader",
    "array_header",
    "claimed",
    "is_sealed",
    "is_shape",
    "open_file",
    "read_header",
    "read_json",
    "read_npz",
    "read_pt",
    "read_pt_tensor",
    "read_tensors",
    "sealed",
    "shown",
    "sync_directory",
    "temporary_of",
    "write_atomically",
    "write_files",
    "write_json",
    "write_tensors",
]
