"""Activations in memory."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int, Int64
from torch import Tensor

from fastsae.data.prefetch import Load, Window
from fastsae.data.shards import WINDOW_BYTES
from fastsae.data.shuffle import Shuffle
from fastsae.data.source import Contexts, Shuffled, StoredActivations

HELDOUT_TOKENS = 65_536
"""Most rows that a fraction sets aside."""
HASHED_ROWS = 4096  # at a time


class ActivationArray(Shuffled):
    """Rows of a tensor or a numpy array [tokens, d_in] of any float dtype, read as float32.

    The rows are neither copied nor converted as a whole: an array may be larger than memory if it
    is memory-mapped (`np.load(path, mmap_mode="r")`). Do not change it while it is in use.

    Args:
        x: the rows.
        contexts: where rows come from, if it is known.
        heldout: rows set aside for evaluation: other activations, or a fraction of x. The latter
            are its last rows, at most 65,536.
        model, hookpoint, harvest: as in `TextActivations`.
        path: the file that x is from, for messages; known of a memory-mapped array.

    Raises ValueError for anything but two dimensions of floats, and contexts of another length.
    """

    def __init__(
        self,
        x: Tensor | np.ndarray,
        contexts: Contexts | None = None,
        heldout: StoredActivations | float | None = None,
        *,
        model: str | None = None,
        hookpoint: str | None = None,
        harvest: dict[str, Any] | None = None,
        path: Path | None = None,
    ):
        check_rows(x)
        if contexts is not None and (found := {len(part) for part in contexts}) != {len(x)}:
            raise ValueError(f"contexts must have {len(x)} entries, like x, got {sorted(found)}")
        self.model, self.hookpoint, self.harvest = model, hookpoint, harvest or {}
        self._mapped = Path(x.filename) if isinstance(x, np.memmap) and x.filename else None
        self.path = path or self._mapped
        self._first = 0
        """The number of the first row in messages."""
        if isinstance(heldout, float | int):
            if not 0 <= heldout < 1:
                raise ValueError(f"heldout must be a fraction below 1, got {heldout}")
            n = len(x) - min(int(len(x) * heldout), HELDOUT_TOKENS)
            last, heldout = (x[n:], _part(contexts, slice(n, None))), None
            x, contexts = x[:n], _part(contexts, slice(n))
            if len(last[0]):
                about = {"model": model, "hookpoint": hookpoint, "harvest": harvest, "path": path}
                heldout = ActivationArray(*last, **about)
                heldout._first = n
        self.heldout = heldout
        self._x, self._contexts = x.detach() if isinstance(x, Tensor) else x, contexts
        self.n_tokens, self.d_in = map(int, x.shape)
        self.fingerprint = self._fingerprint()
        """A short hash of all values; for a memory-mapped array, of its shape, its first and last
        row, and its file's name and size."""

    def _fingerprint(self) -> str:
        digest = hashlib.blake2b(f"{tuple(self._x.shape)} {self._x.dtype}".encode(), digest_size=8)
        if self._mapped is not None:
            digest.update(f"{self._mapped.name} {self._mapped.stat().st_size}".encode())
            digest.update(np.ascontiguousarray(self._x[[0, -1]]).data)  # it may be a slice
            return digest.hexdigest()
        for start in range(0, self.n_tokens, HASHED_ROWS):
            rows = self._x[start : start + HASHED_ROWS]
            if isinstance(rows, Tensor):
                rows = rows.cpu().contiguous().view(torch.uint8).numpy()
            digest.update(np.ascontiguousarray(rows).data)
        return digest.hexdigest()

    @property
    def has_contexts(self) -> bool:
        """Whether it is known where rows come from."""
        return self._contexts is not None

    def contexts(self, indices: Int[Tensor, " N"]) -> Contexts:
        """Tokens, positions and documents of the rows at `indices`; ValueError if unknown."""
        if self._contexts is None:
            raise ValueError("these activations have no token ids")
        rows = torch.from_numpy(self.in_range(indices))
        return Contexts(*(labels[rows] for labels in self._contexts))

    def where(self, row: int) -> str:
        """The row's number, and its file if that is known."""
        return f"{self.path.name + ' ' if self.path else ''}row {self._first + row}"

    def __str__(self) -> str:
        about = [self.hookpoint, self.model and f"of {self.model}"]
        return " ".join(filter(None, about)) or f"{self.n_tokens} rows in memory"

    def gather(self, rows: Int64[np.ndarray, " N"]) -> Float32[np.ndarray, "N d_in"]:
        if isinstance(self._x, Tensor):
            return self._x[torch.from_numpy(rows)].float().cpu().numpy()
        return self._x[rows].astype(np.float32, copy=False)

    def shuffled(self, seed: int) -> tuple[Shuffle, Load]:
        """All rows are permuted at once; those of a file in windows, as in `ActivationShards`."""
        if self._mapped is not None:
            order = Shuffle(self.n_tokens, seed, WINDOW_BYTES // (self._x[:1].nbytes))
            return order, lambda rows: self.gather(rows).__getitem__

        def load(rows: Int64[np.ndarray, " window"]) -> Window:
            return lambda picks: self.gather(rows[picks])

        return Shuffle(self.n_tokens, seed, self.n_tokens, block_rows=1), load


def is_float(x: Tensor | np.ndarray) -> bool:
    return x.is_floating_point() if isinstance(x, Tensor) else x.dtype.kind == "f"


def check_rows(x: Tensor | np.ndarray) -> None:
    """ValueError unless x is a dense matrix of floats."""
    if isinstance(x, Tensor) and (x.layout != torch.strided or x.is_meta):
        given = "on the meta device" if x.is_meta else f"with layout {x.layout}"
        raise ValueError(f"activations must be a dense tensor with values, got one {given}")
    if x.ndim == 2 and is_float(x) and x.shape[0] and x.shape[1]:
        return
    hint = "; flatten the dimensions before the last, x.reshape(-1, x.shape[-1])"
    raise ValueError(
        f"activations must be a float array of shape [tokens, d_in], got {x.dtype} of shape "
        f"{tuple(x.shape)}{hint if is_float(x) and x.ndim > 2 else ''}"
    )


def _part(contexts: Contexts | None, rows: slice) -> Contexts | None:
    return contexts and Contexts(*(labels[rows] for labels in contexts))
