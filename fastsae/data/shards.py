"""Memory-mapped activations on disk: folders of shards, and plain arrays."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Int64
from torch import Tensor

from fastsae.data.index import INDEX, Index, Norm, Shard, read_index, sha256
from fastsae.data.mapped import FLOATS, Mapped, map_npy, map_safetensors, to_float32
from fastsae.data.moments import Moments, Summary
from fastsae.data.prefetch import Load, Window, checked
from fastsae.data.shuffle import Shuffle
from fastsae.data.source import Contexts, Shuffled
from fastsae.files import shown

WINDOW_BYTES = 128_000_000  # data resident at a time
LABELS = ("token_ids", "positions", "documents")


class _File(NamedTuple):
    path: Path
    activations: Mapped
    labels: dict[str, Mapped]
    sha256: str | None


class ActivationShards(Shuffled):
    """Activations in a folder that `harvest` or `ShardWriter` wrote, or in plain files.

    Plain data is an .npy file, a .safetensors file with a single tensor, or a folder of either;
    each holds a float array [tokens, d_in]. Data is read on demand, and about `WINDOW_BYTES` stay
    resident. A shard's SHA-256 is compared with the index when it is first read. A file that is
    missing, truncated or inconsistent with the index is a ValueError that names it.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._index = read_index(self.path) if (self.path / INDEX).is_file() else None
        if self._index is None:
            self._files = [_open_plain(file) for file in _plain_files(self.path)]
        else:
            self._files = [_open_shard(self.path, s, self._index) for s in self._index.shards]
        first = self._files[0].activations
        for file in self._files:
            found = (file.activations.array.shape[1], file.activations.dtype)
            if found != (first.array.shape[1], first.dtype):
                raise ValueError(
                    f"{file.path}: width and dtype are {found}, those of "
                    f"{self._files[0].path.name} are {(first.array.shape[1], first.dtype)}"
                )
        self.d_in = int(first.array.shape[1])
        self.dtype = first.dtype
        self.row_bytes = self.d_in * first.array.itemsize
        """Bytes of a row on disk."""
        self._starts = np.cumsum([0, *(len(file.activations.array) for file in self._files)])
        self.n_tokens = int(self._starts[-1])
        if not self.n_tokens or not self.d_in:
            raise ValueError(f"{self.path} holds no activations: {self.n_tokens} x {self.d_in}")
        self.model = self._index.model if self._index else None
        self.hookpoint = self._index.hookpoint if self._index else None
        self.harvest = (self._index.harvest if self._index else None) or {}
        """Settings of the harvest that wrote the data; empty if it is from elsewhere."""
        self.skipped_rows = self._index.skipped_rows if self._index else 0
        """Rows of the harvested text without a value."""
        self.fingerprint = _fingerprint(self.path, self._files)
        """A short hash of the index, or of the names, sizes and shapes of plain files (not of their
        values)."""
        heldout = self.path / "heldout"
        self.heldout = ActivationShards(heldout) if (heldout / INDEX).is_file() else None
        """Held-out activations, from the subfolder `heldout` if there is one."""
        self._verified: set[int] = set()

    @cached_property
    def _summary(self) -> Summary:
        if self._index:
            return Summary(self._index.mean, self._index.mean_square, self._index.norm)
        moments = Moments(self.d_in)
        for start in range(0, self.n_tokens, 4096):
            rows = np.arange(start, min(start + 4096, self.n_tokens))
            moments.add(checked(self.gather(rows), rows, self.where))
        return moments.summary()

    @property
    def mean(self) -> Float[Tensor, " d_in"]:
        """The mean row. Plain data is read once to compute it."""
        return torch.tensor(self._summary.mean, dtype=torch.float32)

    @property
    def mean_square(self) -> float:
        """Mean square over all entries. Plain data is read once to compute it."""
        return self._summary.mean_square

    @property
    def norm(self) -> Norm:
        """Statistics of the row norms. Plain data is read once to compute them."""
        return self._summary.norm

    @property
    def has_contexts(self) -> bool:
        """Whether it is known where rows come from; plain data has no contexts."""
        return self._index is not None

    def contexts(self, indices: Int[Tensor, " N"]) -> Contexts:
        """Tokens, positions and documents of the rows at `indices`; ValueError for plain data."""
        if not self._index:
            raise ValueError(f"{self.path} is plain data and has no token ids")
        wanted = self.in_range(indices)
        out = {name: torch.empty(len(wanted), dtype=torch.int64) for name in LABELS}
        for number, places, local in self._split(wanted):
            for name in LABELS:
                self._files[number].labels[name].copy(local, out[name].numpy(), places)
        return Contexts(**out)

    def where(self, row: int) -> str:
        """The row's file and its number in that file."""
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return f"{self._files[number].path.name} row {row - int(self._starts[number])}"

    def shuffled(self, seed: int) -> tuple[Shuffle, Load]:
        """The order depends on `seed` and the epoch only."""
        order = Shuffle(self.n_tokens, seed, WINDOW_BYTES // self.row_bytes)
        size = min(order.window_rows, self.n_tokens)
        buffer = np.empty((size, self.d_in), self._files[0].activations.array.dtype)

        def load(rows: Int64[np.ndarray, " window"]) -> Window:
            window = self._copy(rows, buffer[: len(rows)])
            return lambda picks: to_float32(window[picks], self.dtype)

        return order, load

    def verify(self) -> None:
        """Compare every shard's SHA-256 with the index; a ValueError names one that differs."""
        if not self._index:
            raise ValueError(f"{self.path} is plain data: it has no SHA-256 to compare with")
        self._verify(range(len(self._files)))

    def _verify(self, numbers: range | list[int]) -> None:
        with ThreadPoolExecutor() as pool:
            found = pool.map(lambda number: sha256(self._files[number].path), numbers)
            for number, digest in zip(numbers, found, strict=True):
                file = self._files[number]
                if file.sha256 != digest:
                    raise ValueError(
                        f"{file.path} was modified: its SHA-256 is {digest}, "
                        f"the index has {file.sha256}"
                    )
                self._verified.add(number)

    def _verify_touched(self, rows: Int64[np.ndarray, " N"]) -> None:
        if self._index and len(self._verified) < len(self._files):
            touched = {number for number, _, _ in self._split(rows)}
            self._verify(sorted(touched - self._verified))

    def gather(self, rows: Int64[np.ndarray, " N"]) -> Float32[np.ndarray, "N d_in"]:
        out = np.empty((len(rows), self.d_in), self._files[0].activations.array.dtype)
        return to_float32(self._copy(rows, out), self.dtype)

    def _copy(self, rows: Int64[np.ndarray, " N"], out: np.ndarray) -> np.ndarray:
        self._verify_touched(rows)
        for number, places, local in self._split(rows):
            self._files[number].activations.copy(local, out, places)
        return out

    def _split(
        self, rows: Int64[np.ndarray, " N"]
    ) -> Iterator[tuple[int, Int64[np.ndarray, " M"], Int64[np.ndarray, " M"]]]:
        """For each file that has some of the rows: its number, their places in `rows`, and their
        row numbers in the file, increasing."""
        order = np.argsort(rows, kind="stable")
        numbers = np.searchsorted(self._starts, rows[order], side="right") - 1
        touched, firsts = np.unique(numbers, return_index=True)
        for number, places in zip(touched.tolist(), np.split(order, firsts[1:]), strict=True):
            yield number, places, rows[places] - self._starts[number]


def _fingerprint(path: Path, files: list[_File]) -> str:
    if (path / INDEX).is_file():
        about = (path / INDEX).read_bytes()
    else:
        sizes = [(f.path.name, f.path.stat().st_size, f.activations.array.shape) for f in files]
        about = repr(sizes).encode()
    return hashlib.sha256(about).hexdigest()[:16]


def _open_shard(folder: Path, shard: Shard, index: Index) -> _File:
    path = folder / shard.file
    if not path.is_file():
        raise ValueError(f"{path} is missing, but {INDEX} lists it")
    tensors = map_safetensors(path)
    expected = {"activations": (index.dtype, (shard.tokens, index.shape[1]))}
    expected |= {name: ("int32", (shard.tokens,)) for name in LABELS}
    found = {name: (mapped.dtype, mapped.array.shape) for name, mapped in tensors.items()}
    for name in sorted(found.keys() | expected):
        if found.get(name) != expected.get(name):
            wanted = f"{shown(name)} as {expected.get(name)} expected from {INDEX}"
            raise ValueError(f"{path}: {wanted}, {found.get(name)} found")
    labels = {name: tensors[name] for name in LABELS}
    return _File(path, tensors["activations"], labels, shard.sha256)


def _plain_files(path: Path) -> list[Path]:
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.iterdir() if file.suffix in (".npy", ".safetensors"))
    if not files:
        raise ValueError(f"{path} holds neither an {INDEX} nor .npy or .safetensors files")
    return files


def _open_plain(path: Path) -> _File:
    if path.suffix == ".npy":
        mapped = map_npy(path)
    elif path.suffix == ".safetensors":
        tensors = map_safetensors(path)
        if len(tensors) != 1:
            raise ValueError(
                f"{path} holds {len(tensors)} tensors and there is no {INDEX} that lists it; "
                f"plain data has a single tensor per file"
            )
        (mapped,) = tensors.values()
    else:
        raise ValueError(f"{path}: plain data is .npy or .safetensors, or a folder of them")
    if mapped.array.ndim != 2 or mapped.dtype not in FLOATS.values():
        raise ValueError(
            f"{path}: expected a two-dimensional float array, "
            f"found shape {mapped.array.shape} of {mapped.dtype}"
        )
    return _File(path, mapped, {}, None)
