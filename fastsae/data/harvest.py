"""Runs a model over text and stores the outputs, or inputs, of some of its modules."""

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fastsae.config import to_dict
from fastsae.data.harvest_config import HarvestConfig
from fastsae.data.hook_names import is_path, module_paths
from fastsae.data.hookpoints import Hookpoint, hidden_at, hookpoints_at
from fastsae.data.index import INDEX, read_index
from fastsae.data.model import TextWindows, load_model, load_tokenizer
from fastsae.data.shards import ActivationShards
from fastsae.data.text import (
    Documents,
    dataset_rows,
    file_rows,
    is_json_lines,
    text_files,
    text_of,
    tokens_of,
)
from fastsae.data.writer import ShardWriter
from fastsae.device import choose_device
from fastsae.files import claimed
from fastsae.progress import progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GROUP_BATCHES = 4  # batches whose windows are held and sorted by length together
HELDOUT_WINDOWS = 256  # longer documents are held out in runs of this many windows


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

    Globs and TransformerLens names become module paths. All have the same rows, as if each
    hookpoint were harvested alone. Existing shards are reused.
    """
    files = text_files(config.text)
    if config.column != "text" and (other := [file for file in files if not is_json_lines(file)]):
        raise ValueError(
            f"column {config.column!r} needs a dataset or .jsonl files, got {other[0]}"
        )
    model = None
    if not all(map(is_path, config.hookpoints)):
        model = _loaded(config)
        config = replace(config, hookpoint=module_paths(model, config.hookpoints))
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
            _harvest(config, files, missing, model or _loaded(config), progress)
        return {name: _existing(config.folders[name], requests[name]) for name in requests}


def _loaded(config: HarvestConfig) -> "PreTrainedModel":
    return load_model(config.model, choose_device(config.device), config.model_dtype, config.files)


def _harvest(
    config: HarvestConfig,
    files: list[Path],
    requests: dict[str, dict[str, Any]],
    model: "PreTrainedModel",
    progress: bool,
) -> None:
    for name in requests:  # left by a harvest that was killed near its end
        (config.folders[name] / "heldout" / INDEX).unlink(missing_ok=True)
    tokenizer = load_tokenizer(config.model, config.files)
    hookpoints = hookpoints_at(model, list(requests))
    windows = TextWindows(
        tokenizer,
        config.context_length,
        model,
        prepend_bos=config.prepend_bos,
        drop_first=config.drop_first,
    )
    documents = _documents(config, files, tokenizer, model)
    writers: dict[tuple[bool, str], ShardWriter] = {}
    stopped = None
    with progress_bar("harvest", "token", config.max_tokens, shown=progress) as bar:
        for group in _groups(config, windows, documents):
            rows = _run(model, hookpoints, windows, group, config)
            finite = next((i for i, found in enumerate(rows) if not _finite(found)), len(rows))
            if finite < len(group):
                stopped = _overflow(config, group[finite], list(requests), rows[finite])
                group = group[:finite]
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
            if stopped:
                break
    _finish(config, writers, documents.skipped, stopped)


def _finish(
    config: HarvestConfig,
    writers: dict[tuple[bool, str], ShardWriter],
    skipped: int,
    stopped: str | None,
) -> None:
    """Write the indexes; ValueError if there are no rows, or if the harvest ended early."""
    kept = min((w.n_tokens for (heldout, _), w in writers.items() if not heldout), default=0)
    if not kept:
        nulls = f" ({skipped} rows are null)" if skipped else ""
        raise ValueError(
            stopped or f"the text has no tokens: {config.text or config.dataset}{nulls}"
        )
    for key in sorted(writers, reverse=True):  # held out first: the main index is written last
        if writers[key].n_tokens:
            writers[key].finish(skipped_rows=skipped, stopped=stopped)
    if stopped:
        raise ValueError(f"{stopped}. The {kept:,} rows before are saved in {config.out}")


def _finite(found: list[Float[Tensor, "_ _"]]) -> bool:
    return all(bool(x.isfinite().all()) for x in found)


def _overflow(
    config: HarvestConfig, window: _Window, names: list[str], found: list[Float[Tensor, "_ _"]]
) -> str:
    """What is not finite, and what to change."""
    name = next(name for name, x in zip(names, found, strict=True) if not _finite([x]))
    dtypes = {"--model-dtype": config.model_dtype, "--dtype": config.dtype}
    narrow = [f"{option} bfloat16" for option, dtype in dtypes.items() if dtype == "float16"]
    cure = f"float16 ends at 65504, use {' '.join(narrow)}" if narrow else "so the model gives them"
    return f"{name} holds NaN or Inf in document {window.document}: {cure}"


def _request(config: HarvestConfig, files: list[Path], hookpoint: str) -> dict[str, Any]:
    """The settings that determine the rows: a harvest with the same ones is reused."""
    request = to_dict(replace(config, hookpoint=hookpoint))
    for name in ("out", "device", "batch_tokens", "trust_remote_code"):
        del request[name]
    listing = "\n".join(f"{file.name} {file.stat().st_size}" for file in files)
    return {**request, "files": hashlib.sha256(listing.encode()).hexdigest()}


def _existing(out: Path, request: dict[str, Any]) -> ActivationShards:
    index = read_index(out)
    found = index.harvest or {}
    before = {name: found.get(name, getattr(HarvestConfig, name, None)) for name in request}
    other = [name for name in request if before[name] != request[name]]
    if other:
        raise ValueError(
            f"{out} already holds other activations, with {other[0]} = {before[other[0]]!r} "
            f"instead of {request[other[0]]!r}; choose a new folder"
        )
    if index.stopped:
        raise ValueError(f"{out} holds a harvest that ended early: {index.stopped}")
    return ActivationShards(out)


def _documents(config: HarvestConfig, files: list[Path], tokenizer: Any, model: Any) -> Documents:
    if config.dataset is None:
        rows = file_rows(files, config.column)
    else:
        rows = dataset_rows(
            config.dataset,
            config=config.dataset_config,
            split=config.dataset_split,
            column=config.column,
        )
    if config.tokens_column is None:
        return Documents(rows, lambda value: text_of(value, tokenizer))
    vocabulary = len(model.get_input_embeddings().weight)
    return Documents(rows, lambda value: tokens_of(value, vocabulary))


def _groups(
    config: HarvestConfig, windows: TextWindows, documents: Documents
) -> Iterator[list[_Window]]:
    """Groups of windows of consecutive documents, until there are `max_tokens`."""
    group: list[_Window] = []
    size, taken = 0, 0
    for number, document in documents:
        digest = hashlib.sha256(str(document).encode("utf-8", "replace")).digest()
        for place, ids in enumerate(windows.cut(document, config.max_document_tokens)):
            part = place // HELDOUT_WINDOWS
            heldout = _draw(digest, part) < config.heldout_fraction and (number, part) != (0, 0)
            group.append(_Window(ids, number, heldout))
            size += len(ids)
            taken += 0 if heldout else len(windows.rows(ids))
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
        places = windows.rows(window.ids)
        ids = [window.ids[p] for p in places]
        labels.append(torch.tensor([ids, places, [window.document] * len(ids)]).view(3, -1))
    return torch.cat(labels, 1).long()
