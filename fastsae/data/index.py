"""`index.json`, which describes a folder of activation shards; written last, checked on read."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from fastsae.config import from_dict, to_dict
from fastsae.files import read_json, shown, write_json

VERSION = 1
INDEX = "index.json"
MAX_INDEX_BYTES = 8 << 20
"""Enough for 50,000 shards."""
Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[str, ...] = get_args(Dtype)


@dataclass(frozen=True, kw_only=True)
class Shard:
    file: str
    """Name of a safetensors file in the same folder."""

    tokens: int
    """Rows in it."""

    sha256: str
    """SHA-256 of the file, in hex."""

    def __post_init__(self):
        if self.file in ("", "..") or Path(self.file).name != self.file or "\\" in self.file:
            raise ValueError(f"{shown(self.file)} is not the name of a file in the folder")
        if self.tokens < 1:
            raise ValueError(f"shard {shown(self.file)} has {self.tokens} tokens")


@dataclass(frozen=True, kw_only=True)
class Norm:
    """Statistics of the row norms."""

    mean: float
    std: float
    min: float
    max: float

    median: float | None = None
    """To within 0.4 %; None in older files."""

    huge_fraction: float | None = None
    """Fraction of rows whose norm is above 10 times the median."""


@dataclass(frozen=True, kw_only=True)
class Index:
    """Contents of a folder of shards."""

    shape: tuple[int, ...]
    """Total number of rows, and their width d_in."""

    dtype: Dtype
    """dtype of the activations."""

    shards: tuple[Shard, ...]
    """In row order."""

    mean: tuple[float, ...]
    """Mean row."""

    mean_square: float
    """Mean square over all entries."""

    norm: Norm
    """Statistics of the row norms."""

    model: str | None = None
    """Model the activations come from."""

    hookpoint: str | None = None
    """Hookpoint they were harvested at."""

    harvest: dict | None = None
    """All settings that determined the rows, to recognize an identical harvest."""

    skipped_rows: int = 0
    """Rows of the text without a value, which were skipped."""

    stopped: str | None = None
    """Why the harvest ended early, if it did."""

    version: int = VERSION
    """Version of the format."""

    def __post_init__(self):
        total = sum(shard.tokens for shard in self.shards)
        if not self.shards:
            raise ValueError("it lists no shards")
        if len({shard.file for shard in self.shards}) < len(self.shards):
            raise ValueError("it lists a shard twice")
        norms = [value for value in to_dict(self.norm).values() if value is not None]
        if min(self.mean_square, *norms) < 0:
            raise ValueError("mean_square and the statistics of norms must be at least 0")
        if self.shape != (total, len(self.mean)):
            raise ValueError(
                f"shape is {shown([*self.shape])} but the shards hold {total} tokens "
                f"and the mean has {len(self.mean)} entries"
            )


def write_index(folder: Path, index: Index) -> None:
    write_json(folder / INDEX, to_dict(index))


def read_index(folder: Path) -> Index:
    """Read and check `index.json`; a ValueError names the file and what is wrong with it."""
    path = folder / INDEX
    raw = read_json(path, MAX_INDEX_BYTES)
    version = raw.get("version") if isinstance(raw, dict) else None
    if version != VERSION:
        raise ValueError(f"{path}: expected format version {VERSION}, found {shown(version)}")
    try:
        return from_dict(Index, raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
