"""Writes activations to shards as they arrive."""

from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastsae.data.index import DTYPES, INDEX, Dtype, Index, Shard, sha256, write_index
from fastsae.data.moments import Moments
from fastsae.files import write_tensors

SHARD_BYTES = 128_000_000
LABEL_BYTES = 12
"""Of a row's token, position and document."""


class ShardWriter:
    """Appends rows to a folder of shards; `finish` writes its index.

    Shards that a killed writer left, without an index, are overwritten. ValueError for a folder
    with an index.
    """

    def __init__(
        self,
        folder: str | Path,
        d_in: int,
        *,
        dtype: str = "float32",
        model: str | None = None,
        hookpoint: str | None = None,
        harvest: dict[str, Any] | None = None,
        shard_bytes: int = SHARD_BYTES,
    ):
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        self.folder, self.d_in, self.dtype = Path(folder), d_in, dtype
        if (self.folder / INDEX).exists():
            raise ValueError(f"{self.folder} already holds activations; choose a new folder")
        self.n_tokens = 0
        self._about: dict[str, Any] = {"model": model, "hookpoint": hookpoint, "harvest": harvest}
        self._torch_dtype: torch.dtype = getattr(torch, dtype)
        self._row_bytes = d_in * self._torch_dtype.itemsize + LABEL_BYTES
        self._shard_tokens = max(1, shard_bytes // self._row_bytes)
        self._moments = Moments(d_in)
        self._shards: list[Shard] = []
        self._pending: list[dict[str, Tensor]] = []
        self.folder.mkdir(parents=True, exist_ok=True)
        self._unfinished = self.folder / ".unfinished"
        leftovers = list(self.folder.glob("shard-*.safetensors"))
        if leftovers and not self._unfinished.exists():
            raise ValueError(f"{self.folder} holds shards from elsewhere; choose a new folder")
        self._unfinished.touch()
        for leftover in leftovers:
            leftover.unlink()

    def append(
        self,
        activations: Float[Tensor, "N d_in"],
        token_ids: Int[Tensor, " N"],
        positions: Int[Tensor, " N"],
        documents: Int[Tensor, " N"],
    ) -> None:
        """Append rows; ValueError if they contain NaN or Inf after conversion to `dtype`."""
        if activations.shape[1] != self.d_in:
            raise ValueError(f"rows have {activations.shape[1]} entries, expected {self.d_in}")
        stored = activations.detach().to("cpu", self._torch_dtype)
        exact = stored.to(torch.float32)
        if not exact.isfinite().all():
            bad = self.n_tokens + int((~exact.isfinite().all(1)).nonzero()[0])
            raise ValueError(f"activations hold NaN or Inf as {self.dtype}: row {bad}")
        self._moments.add(exact.numpy())
        labels = {"token_ids": token_ids, "positions": positions, "documents": documents}
        rows = {name: x.to("cpu", torch.int32) for name, x in labels.items()}
        rows["activations"] = stored
        start = 0
        while start < len(stored):
            room = self._shard_tokens - self.n_tokens % self._shard_tokens
            part = {name: x[start : start + room] for name, x in rows.items()}
            self._pending.append(part)
            self.n_tokens += len(part["activations"])
            start += room
            if self.n_tokens % self._shard_tokens == 0:
                self._flush()

    @property
    def pending_bytes(self) -> int:
        """Size of the rows that are not written yet."""
        return self.n_tokens % self._shard_tokens * self._row_bytes

    def finish(self, *, skipped_rows: int = 0, stopped: str | None = None) -> None:
        """Write the last shard and the index; ValueError if no row was appended.

        Args:
            skipped_rows: rows of the text that had no value.
            stopped: why no more rows were appended, if something went wrong.
        """
        if not self.n_tokens:
            raise ValueError(f"no rows to write to {self.folder}")
        if self._pending:
            self._flush()
        index = Index(
            shape=(self.n_tokens, self.d_in),
            dtype=cast(Dtype, self.dtype),
            shards=tuple(self._shards),
            **self._moments.summary()._asdict(),
            **self._about,
            skipped_rows=skipped_rows,
            stopped=stopped,
        )
        write_index(self.folder, index)
        self._unfinished.unlink()

    def _flush(self) -> None:
        rows = {name: torch.cat([p[name] for p in self._pending]) for name in self._pending[0]}
        self._pending.clear()
        path = self.folder / f"shard-{len(self._shards):05d}.safetensors"
        write_tensors(path, rows)
        tokens = len(rows["activations"])
        self._shards.append(Shard(file=path.name, tokens=tokens, sha256=sha256(path)))
