"""What a trainer accepts as activations."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.data import Dataset

from fastsae.data.arrays import ActivationArray
from fastsae.data.iterables import IterableProducer, rows_of
from fastsae.data.producer import Producer
from fastsae.data.shards import ActivationShards
from fastsae.data.source import ActivationSource, StoredActivations
from fastsae.data.stream import BUFFER_TOKENS, Stream
from fastsae.data.vllm import VllmHiddenStates, is_vllm
from fastsae.files import read_pt_tensor

HELDOUT_FRACTION = 0.05
SLICE_ROWS = 128  # of a Hugging Face dataset
BUFFER_BYTES = 1 << 31
"""The memory of a stream's buffer, at most. It does not depend on what is available: the order of
the rows depends on it."""

ACCEPTED = (
    "a tensor or array [tokens, d_in]; a path to shards, .npy, .safetensors or .pt files; "
    "a DataLoader, a Dataset, or another iterable of [n, d_in] tensors, or a function that returns "
    "one; a Producer; an ActivationSource"
)


def as_source(given: object) -> ActivationSource:
    """Activations to train on, from whatever holds or yields them.

    - An `ActivationSource` is returned as it is.
    - A tensor or array becomes an `ActivationArray`; its last 5 % of rows, at most 65,536, are set
      aside for evaluation.
    - A path is opened by `open_path`; a folder that vLLM wrote, if it holds a single layer, as
      `VllmHiddenStates`.
    - A `Producer` becomes a `Stream`, as does, by `IterableProducer`, an iterable of batches (a
      `DataLoader`, a `Dataset` of PyTorch or Hugging Face or a column of it, a generator, a list),
      or a function that returns one.

    ValueError for anything else.
    """
    # A stream comes first: the protocol's check asks for its held-out rows, which it then produces.
    if isinstance(given, Stream | ActivationSource):
        return given
    if isinstance(given, Tensor | np.ndarray):
        return ActivationArray(given, heldout=HELDOUT_FRACTION)
    if isinstance(given, str | Path):
        path = Path(given)
        return streamed(VllmHiddenStates(path)) if is_vllm(path) else open_path(path)
    if isinstance(given, Producer):
        return streamed(given)
    if isinstance(given, Mapping) and given:  # such as a DatasetDict
        keys = ", ".join(map(repr, islice(given, 5)))
        raise ValueError(f"cannot train on {type(given).__name__}; give one of its values: {keys}")
    if _is_table(given):
        return streamed(IterableProducer(_Slices(given)))
    if isinstance(given, Dataset) and not isinstance(given, Iterable):
        return streamed(IterableProducer(_Items(given)))
    if isinstance(given, Iterable | Callable) and not isinstance(given, nn.Module | type):
        return streamed(IterableProducer(given))
    name = type(given).__name__
    if hasattr(given, "batches"):
        members = [member for member in vars(ActivationSource) if not member.startswith("_")]
        missing = ", ".join(member for member in members if not hasattr(given, member))
        raise ValueError(f"cannot train on {name}: as an ActivationSource, it lacks {missing}")
    raise ValueError(f"cannot train on {name}; give {ACCEPTED}")


def open_path(path: Path) -> StoredActivations:
    """The activations in a folder or a file: a .pt or .pth file holds a tensor, and is read into
    memory without unpickling it; anything else is as in `ActivationShards`."""
    if path.suffix not in (".pt", ".pth"):
        return ActivationShards(path)
    x = read_pt_tensor(path)
    try:
        return ActivationArray(x, path=path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def streamed(producer: Producer) -> Stream:
    """A stream with a buffer of the default size, or 2 GiB if that is less."""
    row_bytes = 4 * sum(producer.widths.values())
    return Stream(producer, max(2, min(BUFFER_TOKENS, BUFFER_BYTES // row_bytes)))


def _is_table(given: Any) -> bool:
    """Whether it is a Hugging Face dataset, or a column of one, with a vector in each row."""
    known = type(given).__module__.split(".")[0] == "datasets" and hasattr(given, "__len__")
    return known and len(given) > 0 and len(rows_of(given[0], 0)) == 1


class _Slices:
    """The rows of a table, many at a time: it is slow to read them one by one."""

    def __init__(self, table: Any):
        self.table, self.starts = table, range(0, len(table), SLICE_ROWS)

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator:
        return (self.table[start : start + SLICE_ROWS] for start in self.starts)


class _Items:
    """The items of a map-style dataset in order."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator:
        return (self.dataset[number] for number in range(len(self)))
