"""Hidden states that vLLM saved."""

import hashlib
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from fastsae.data.producer import Group, Part, Place
from fastsae.data.source import Contexts
from fastsae.files import read_header, read_tensors, shown

HELDOUT_EVERY = 20
GROUP_TOKENS = 4096
TENSORS = {"hidden_states", "token_ids"}


class VllmHiddenStates:
    """A `Producer` of one layer's rows in a folder that vLLM's `extract_hidden_states` wrote.

    Each file holds a request: `hidden_states` [tokens, layers, d_in] and `token_ids` [tokens]. This
    is the layout of vLLM 0.22
    (https://docs.vllm.ai/en/v0.22.0/features/speculative_decoding/extract_hidden_states/). A file
    counts as a document. In the order of their names, every 20th is held out. vLLM must have
    finished writing them.

    Args:
        folder: the `shared_storage_path` of vLLM's connector.
        layer: which of the saved layers, from 0, in the order of vLLM's
            `eagle_aux_hidden_state_layer_ids`. May be left out if there is only one.
        drop_first: leave out the first token of each file, which is often an attention sink.

    Raises ValueError for files of another layout, and for a layer that they do not have.
    """

    def __init__(self, folder: str | Path, layer: int | None = None, *, drop_first: bool = False):
        self.folder = Path(folder)
        self._files = _files(self.folder)
        if not self._files:
            raise ValueError(f"{folder} holds no .safetensors files")
        self._drop_first = drop_first
        _, layers, width = _shape(self._files[0])
        if layer is None and layers > 1 or layer is not None and not 0 <= layer < layers:
            raise ValueError(f"{folder}: layer must be from 0 to {layers - 1}, got {layer}")
        self._layer, self._layers, self._width = layer or 0, layers, width
        self.widths = {f"layer {self._layer}": width}
        about = [(path.name, path.stat().st_size) for path in self._files]
        about = repr((about, self._layer, drop_first)).encode()
        self.fingerprint = hashlib.sha256(about).hexdigest()[:16]
        """A short hash of the settings and of the files' names and sizes."""

    def groups(self, start: Place = (), part: Part = "train") -> Iterator[Group]:
        """See `Producer`. A place is the number of files before it."""
        (first,) = start or (0,)
        numbers = (
            number
            for number in range(first, len(self._files))
            if part in ("both", "heldout" if is_heldout(number) else "train")
        )
        for heldout, run in groupby(numbers, is_heldout):
            found, size, number = list[tuple[Tensor, Contexts]](), 0, first
            for number in run:
                found.append(self._read(number))
                size += len(found[-1][0])
                if size >= GROUP_TOKENS:
                    yield _group(found, (number + 1,), heldout)
                    found, size = [], 0
            if found:
                yield _group(found, (number + 1,), heldout)

    def _read(self, number: int) -> tuple[Float[Tensor, "N D"], Contexts]:
        path = self._files[number]
        tokens, layers, width = _shape(path)
        if (layers, width) != (self._layers, self._width):
            raise ValueError(
                f"{path} has {layers} layers of width {width}, "
                f"{self._files[0].name} has {self._layers} of width {self._width}"
            )
        tensors, keep = read_tensors(path), slice(int(self._drop_first), None)
        x, ids = tensors["hidden_states"][:, self._layer], tensors["token_ids"].long()
        finite = x.isfinite().all(1)
        if not finite.all():
            raise ValueError(f"{path} holds NaN or Inf at token {int(finite.byte().argmin())}")
        positions, documents = torch.arange(tokens), torch.full((tokens,), number)
        return x[keep], Contexts(ids[keep], positions[keep], documents[keep])


def is_vllm(folder: Path) -> bool:
    """Whether the first file of a folder is one that vLLM wrote."""
    files = _files(folder)
    return bool(files) and read_header(files[0]).keys() == TENSORS


def is_heldout(number: int) -> bool:
    return number % HELDOUT_EVERY == HELDOUT_EVERY - 1


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _shape(path: Path) -> tuple[int, int, int]:
    """Tokens, layers and width in a file; ValueError if it is not one of vLLM's."""
    header = read_header(path)
    shapes = {name: (entry.dtype, entry.shape) for name, entry in header.items()}
    match shapes:
        case {
            "hidden_states": ("F32" | "F16" | "BF16", [int(tokens), int(layers), int(width)]),
            "token_ids": ("I64" | "I32", [int(ids)]),
        } if ids == tokens and layers and width:
            return tokens, layers, width
    raise ValueError(
        f"{path}: expected hidden_states [tokens, layers, d_in] and token_ids [tokens], as vLLM "
        f"writes them, found {shown(shapes)}"
    )


def _group(found: list[tuple[Tensor, Contexts]], after: Place, heldout: bool) -> Group:
    rows, contexts = zip(*found, strict=True)
    labels = (torch.cat(parts) for parts in zip(*contexts, strict=True))
    return Group((torch.cat(rows),), Contexts(*labels), after, heldout, finite=True)
