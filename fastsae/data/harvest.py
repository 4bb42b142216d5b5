"""Runs a model over text and stores the outputs, or inputs, of some of its modules."""

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fastsae.config import check_choices, to_dict
from fastsae.data.index import INDEX, Dtype, read_index
from fastsae.data.model import (
    Hookpoint,
    TextWindows,
    hidden_at,
    hookpoint_at,
    load_model,
    load_tokenizer,
)
from fastsae.data.shards import ActivationShards
from fastsae.data.text import dataset_documents, file_documents, text_files
from fastsae.data.writer import ShardWriter
from fastsae.device import check_device, choose_device
from fastsae.files import claimed
from fastsae.progress import progress_bar

GROUP_BATCHES = 4  # batches whose windows are held and sorted by length together
HELDOUT_WINDOWS = 256  # longer documents are held out in runs of this many windows


@dataclass(frozen=True, kw_only=True)
class HarvestConfig:
    """Run a Hugging Face model over text and save activations at one or more hookpoints."""

    model: str
    """Hugging Face hub id, or a model directory."""

    hookpoint: str | tuple[str, ...]
    """Module whose output is saved, such as `encoder.layer.3` or `model.layers.12`; with `:in`
    appended, its input. Several hookpoints are harvested in one pass, with the same rows."""

    out: Path
    """Output directory for the shards; held-out shards go to its subdirectory `heldout`. With
    several hookpoints, each gets a subdirectory of its name."""

    text: tuple[str, ...] = ()
    """Text files, directories or globs. A .jsonl file holds one object with a "text" field per
    line."""

    dataset: str | None = None
    """Hub id or directory of a dataset, instead of `text`."""

    dataset_config: str | None = None
    """Dataset configuration, if it has several."""

    dataset_split: str = "train"
    """Dataset split."""

    text_column: str = "text"
    """Dataset column that holds the text."""

    context_length: int = 128
    """Context length in tokens, special tokens included; longer documents are split."""

    max_tokens: int | None = None
    """Stop once this many training tokens have been collected."""

    max_document_tokens: int | None = None
    """Use only the first N tokens of each document."""

    heldout_fraction: float = 0.05
    """Fraction of the documents (and of the parts of long ones) held out for evaluation."""

    dtype: Dtype = "float32"
    """Precision of the saved activations."""

    model_dtype: Dtype = "float32"
    """Precision of the model."""

    device: str = "auto"
    """Device for the model: auto (a GPU if available), cpu, cuda, or cuda:N."""

    batch_tokens: int = 8192
    """Tokens per forward pass, including padding."""

    def __post_init__(self):
        check_device(self.device)
        names = self.hookpoints
        if not names or len({*names}) < len(names) or any(Path(n).name != n for n in names):
            raise ValueError(f"hookpoint must be one or more distinct module paths, got {names}")
        if bool(self.text) == bool(self.dataset):
            raise ValueError(
                f"give either text or dataset, got text {self.text} and dataset {self.dataset!r}"
            )
        check_choices(self, dtype=Dtype, model_dtype=Dtype)
        for name in ("context_length", "max_tokens", "max_document_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.batch_tokens < self.context_length:
            raise ValueError(
                f"batch_tokens must be at least context_length = {self.context_length}, "
                f"got {self.batch_tokens}"
            )
        if not 0 <= self.heldout_fraction < 1:
            raise ValueError(
                f"heldout_fraction must be at least 0 and below 1, got {self.heldout_fraction}"
            )
        used = self.text and (self.dataset_config, self.dataset_split, self.text_column)
        if used and used != (None, "train", "text"):
            raise ValueError("dataset_config, dataset_split and text_column need a dataset")

    @property
    def hookpoints(self) -> tuple[str, ...]:
        """All hookpoints, in order."""
        return (self.hookpoint,) if isinstance(self.hookpoint, str) else self.hookpoint

    @property
    def folders(self) -> dict[str, Path]:
        """The folder for each hookpoint's shards."""
        several = len(self.hookpoints) > 1
        return {name: self.out / name if several else self.out for name in self.hookpoints}


class _Window(NamedTuple):
    ids: list[int]
    document: int
    heldout: bool


def harvest(config: HarvestConfig, progress: bool = True) -> ActivationShards:
    """Run the model over the text and store the hookpoint's activations for every text token.

    Padding and special tokens are left out. If the folder already holds this harvest, it is opened
    and returned; another harvest there is a ValueError. A killed harvest leaves no index and starts
    over. With several hookpoints, the first one's shards are returned.
    """
    return next(iter(harvest_each(config, progress).values()))


def harvest_each(config: HarvestConfig, progress: bool = True) -> dict[str, ActivationShards]:
    """Like `harvest`, but returns the shards of every hookpoint by name.

    All have the same rows, as if each hookpoint were harvested alone. Existing shards are reused.
    """
    files = text_files(config.text)
    requests = {name: _request(config, files, name) for name in config.hookpoints}
    with ExitStack() as claims:
        for folder in sorted(config.folders.values()):  # sorted, or two harvests could deadlock
            claims.enter_context(claimed(folder, wait=True))  # its result may be reused
        missing: dict[str, dict[str, Any]] = {}
        for name, folder in config.folders.items():
            if (folder / INDEX).exists():
                _existing(folder, requests[name])
            else:
                missing[name] = requests[name]
        if missing:
            _harvest(config, files, missing, progress)
        return {name: _existing(config.folders[name], requests[name]) for name in requests}


def _harvest(
    config: HarvestConfig, files: list[Path], requests: dict[str, dict[str, Any]], progress: bool
) -> None:
    for name in requests:  # left by a harvest that was killed near its end
        (config.folders[name] / "heldout" / INDEX).unlink(missing_ok=True)
    model = load_model(config.model, choose_device(config.device), config.model_dtype)
    hookpoints = [hookpoint_at(model, name) for name in requests]
    windows = TextWindows(load_tokenizer(config.model), config.context_length, model)
    writers: dict[tuple[bool, str], ShardWriter] = {}
    with progress_bar("harvest", "token", config.max_tokens, shown=progress) as bar:
        for group in _groups(config, windows, _documents(config, files)):
            rows = _run(model, hookpoints, windows, group, config)
            for heldout in {window.heldout for window in group}:
                chosen = [i for i, window in enumerate(group) if window.heldout == heldout]
                labels = _labels(windows, [group[i] for i in chosen])
                for place, (name, request) in enumerate(requests.items()):
                    x = torch.cat([rows[i][place] for i in chosen])
                    if (heldout, name) not in writers:
                        folder = config.folders[name] / ("heldout" if heldout else "")
                        writers[heldout, name] = _writer(folder, x.shape[1], request)
                    writers[heldout, name].append(x, *labels)
                bar.update(0 if heldout else labels.shape[1])
    if all(heldout for heldout, _ in writers):
        raise ValueError(f"the text has no tokens: {config.text or config.dataset}")
    for key in sorted(writers, reverse=True):  # held out first: the main index is written last
        if writers[key].n_tokens:
            writers[key].finish()


def _request(config: HarvestConfig, files: list[Path], hookpoint: str) -> dict[str, Any]:
    """The settings that determine the rows: a harvest with the same ones is reused."""
    request = to_dict(replace(config, hookpoint=hookpoint))
    for name in ("out", "device", "batch_tokens"):
        del request[name]
    listing = "\n".join(f"{file.name} {file.stat().st_size}" for file in files)
    return {**request, "files": hashlib.sha256(listing.encode()).hexdigest()}


def _existing(out: Path, request: dict[str, Any]) -> ActivationShards:
    found = read_index(out).harvest or {}
    other = [name for name in request if found.get(name) != request[name]]
    if other:
        raise ValueError(
            f"{out} already holds other activations, with {other[0]} = {found.get(other[0])!r} "
            f"instead of {request[other[0]]!r}; choose a new folder"
        )
    return ActivationShards(out)


def _documents(config: HarvestConfig, files: list[Path]) -> Iterator[str]:
    if config.dataset is None:
        return file_documents(files)
    return dataset_documents(
        config.dataset,
        config=config.dataset_config,
        split=config.dataset_split,
        text_column=config.text_column,
    )


def _groups(
    config: HarvestConfig, windows: TextWindows, documents: Iterator[str]
) -> Iterator[list[_Window]]:
    """Groups of windows of consecutive documents, until there are `max_tokens`."""
    group: list[_Window] = []
    size, taken = 0, 0
    for number, text in enumerate(documents):
        digest = hashlib.sha256(text.encode("utf-8", "replace")).digest()
        for place, ids in enumerate(windows.cut(text, config.max_document_tokens)):
            part = place // HELDOUT_WINDOWS
            heldout = _draw(digest, part) < config.heldout_fraction and (number, part) != (0, 0)
            group.append(_Window(ids, number, heldout))
            size += len(ids)
            taken += 0 if heldout else windows.kept(ids)
            if config.max_tokens is not None and taken >= config.max_tokens:
                yield group
                return
            if size >= GROUP_BATCHES * config.batch_tokens:
                yield group
                group, size = [], 0
    if group:
        yield group


def _draw(digest: bytes, part: int) -> float:
    """A number in [0, 1) that depends only on the text, so duplicates are held out together."""
    drawn = hashlib.sha256(digest + part.to_bytes(8, "little")).digest()
    return int.from_bytes(drawn[:6], "little") / 2**48


def _run(
    model: nn.Module,
    hookpoints: list[Hookpoint],
    windows: TextWindows,
    group: list[_Window],
    config: HarvestConfig,
) -> list[list[Float[Tensor, "_ _"]]]:
    """Each window's text rows at each hookpoint. Sorting windows by length saves padding."""
    rows: dict[int, list[Tensor]] = {}
    longest_first = sorted(range(len(group)), key=lambda i: -len(group[i].ids))
    while longest_first:
        fit = config.batch_tokens // len(group[longest_first[0]].ids)
        members, longest_first = longest_first[:fit], longest_first[fit:]
        batch = windows.batch([group[i].ids for i in members])
        dtype = getattr(torch, config.dtype)
        found = [hidden.to("cpu", dtype) for hidden in hidden_at(model, hookpoints, batch)]
        for place, i in enumerate(members):
            rows[i] = [hidden[place][batch.keep[place]] for hidden in found]
    return [rows[i] for i in range(len(group))]


def _writer(folder: Path, d_in: int, request: dict[str, Any]) -> ShardWriter:
    about = {name: request[name] for name in ("dtype", "model", "hookpoint")}
    return ShardWriter(folder, d_in, harvest=request, **about)


def _labels(windows: TextWindows, group: list[_Window]) -> Int[Tensor, "3 _"]:
    """Token ids, positions and documents of the text rows of these windows."""
    labels: list[Int[Tensor, "3 _"]] = []
    for window in group:
        places = [p for p, token in enumerate(window.ids) if token not in windows.special]
        ids = [window.ids[p] for p in places]
        labels.append(torch.tensor([ids, places, [window.document] * len(ids)]).view(3, -1))
    return torch.cat(labels, 1).long()
