"""JSON, safetensors, .npy, .npz and .pt files: written atomically, and read with nothing unpickled.

A file can claim anything. What it claims is compared with its length before memory is allocated,
and a file that is missing, damaged or truncated is one ValueError that names it.
"""

from .archives import read_npz, read_pt, read_pt_tensor
from .checksum import CHECKSUM, Content, in_hex, is_sealed, joined_crc32, sealed
from .headers import ArrayHeader, Entry, array_header, is_shape, read_header, read_tensors
from .parts import Extent, Layout, create, layout_of, share, write_rows
from .read import open_file, read_json, shown
from .write import (
    claimed,
    finish,
    sync_directory,
    temporary_of,
    write_atomically,
    write_files,
    write_json,
    write_settings,
    write_tensors,
)

__all__ = [
    "CHECKSUM",
    "ArrayHeader",
    "Content",
    "Entry",
    "Extent",
    "Layout",
    "array_header",
    "claimed",
    "create",
    "finish",
    "in_hex",
    "is_sealed",
    "is_shape",
    "joined_crc32",
    "layout_of",
    "open_file",
    "read_header",
    "read_json",
    "read_npz",
    "read_pt",
    "read_pt_tensor",
    "read_tensors",
    "sealed",
    "share",
    "shown",
    "sync_directory",
    "temporary_of",
    "write_atomically",
    "write_files",
    "write_json",
    "write_rows",
    "write_settings",
    "write_tensors",
]
