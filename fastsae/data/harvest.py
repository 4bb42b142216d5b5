"""Runs a model over text and stores the outputs, or inputs, of some of its modules."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastsae.data.disk import check_space, nearly_full
from fastsae.data.harvest_config import HarvestConfig
from fastsae.data.hook_names import is_path, module_paths
from fastsae.data.index import INDEX, read_index
from fastsae.data.model import own_dtype
from fastsae.data.open_producer import facts, loaded, open_producer, read_files, request
from fastsae.data.producer import NotFinite
from fastsae.data.shards import ActivationShards
from fastsae.data.writer import ShardWriter
from fastsae.files import claimed
from fastsae.progress import progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    files, model = read_files(config), None
    if not all(map(is_path, config.hookpoints)):
        model = loaded(config, config.device)
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
            if config.dtype == "auto":
                config = replace(config, dtype=own_dtype(config.model, config.files))
            _harvest(config, files, missing, model or loaded(config, config.device), progress)
        return {name: _existing(config.folders[name], requests[name]) for name in requests}


def _harvest(
    config: HarvestConfig,
    files: list[Path],
    requests: dict[str, dict[str, Any]],
    model: "PreTrainedModel",
    progress: bool,
) -> None:
    for name in requests:  # left by a harvest that was killed near its end
        (config.folders[name] / "heldout" / INDEX).unlink(missing_ok=True)
    settings = replace(config, hookpoint=tuple(requests))
    producer, documents = open_producer(settings, files, model, getattr(torch, config.dtype))
    check_space(config, producer.widths, progress)
    writers: dict[tuple[bool, str], ShardWriter] = {}
    stopped = None
    with progress_bar("harvest", "token", config.max_tokens, shown=progress) as bar:
        try:
            for group in producer.groups((), "both", config.max_tokens):
                rows, contexts, heldout = group.rows, group.contexts, group.heldout
                assert contexts is not None
                if stopped := nearly_full(config, writers.values(), rows):
                    break
                for x, (name, request) in zip(rows, requests.items(), strict=True):
                    if (heldout, name) not in writers:
                        folder = config.folders[name] / ("heldout" if heldout else "")
                        stored = request | {"dtype": config.dtype} | facts(producer, [name])
                        writers[heldout, name] = _writer(folder, x.shape[1], stored)
                    writers[heldout, name].append(x, *contexts)
                bar.update(0 if heldout else len(contexts.positions))
        except NotFinite as error:
            stopped = f"{error}: {_cure(config)}"
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


def _cure(config: HarvestConfig) -> str:
    """What to change if activations are not finite."""
    dtypes = {"--model-dtype": config.model_dtype, "--dtype": config.dtype}
    narrow = [f"{option} bfloat16" for option, dtype in dtypes.items() if dtype == "float16"]
    return f"float16 ends at 65504, use {' '.join(narrow)}" if narrow else "so the model gives them"


def _request(config: HarvestConfig, files: list[Path], hookpoint: str) -> dict[str, Any]:
    """The settings that determine the stored rows: a harvest with the same ones is reused, and one
    in any dtype unless a dtype is given."""
    own = {"max_tokens": config.max_tokens}
    own |= {} if config.dtype == "auto" else {"dtype": config.dtype}
    return request(config, files, hookpoint) | own


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


def _writer(folder: Path, d_in: int, request: dict[str, Any]) -> ShardWriter:
    about = {name: request[name] for name in ("dtype", "model", "hookpoint")}
    return ShardWriter(folder, d_in, harvest=request, **about)
