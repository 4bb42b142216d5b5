"""Checkpoints: one directory each, written atomically; only the newest are kept.

Several processes write one together, each its own rows, and any number of processes can read it. In
all functions with `shards`, every process calls them at the same time; where one fails, all raise.
"""

import logging
import os
import re
import secrets
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastsae.files import (
    CHECKSUM,
    is_sealed,
    read_json,
    read_tensors,
    sealed,
    shown,
    sync_directory,
    write_json,
    write_tensors,
)
from fastsae.meeting import on_first
from fastsae.progress import say
from fastsae.sharded import REPLICATED, read_rows, read_shards, write_shards
from fastsae.shards import ONE_PROCESS, Shards
from fastsae.version import __version__, written_by

FORMAT = "fastsae.checkpoint.1"
SHARDED = "fastsae.checkpoint.2"
"""The format that several processes write: the checksum in state.json is of itself alone."""

_NAME = re.compile(r"step-(\d{8,})(\.old)?")

Checkpoint = tuple[dict[str, Tensor], dict[str, Any]]
"""The tensors and the metadata."""


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    keep: int,
    sharded: Collection[str] = (),
    shards: Shards = ONE_PROCESS,
) -> Path:
    """Write folder/step-XXXXXXXX, then remove all but the newest `keep` checkpoints.

    A checkpoint is written under a temporary name, synced, then renamed, so every one that is
    listed is complete. One of the same step is renamed to step-XXXXXXXX.old first. That one counts
    if a crash comes between the two renames, so that a step once saved always has a checkpoint.

    Args:
        tensors: by name; of those that `sharded` names, the rows of this process's latents, of all
            others the same as on all processes.
        meta: the same on all processes.

    Raises OSError if it cannot be written, and ValueError if processes differ that should hold the
    same; both leave the older checkpoints as they are.
    """
    final = folder / f"step-{step:08d}"
    temporary = on_first(shards, lambda: _begin(folder, final, shards))
    about = {"version": __version__, "step": step, **meta}
    try:
        if shards.size == 1:
            tensors = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
            write_tensors(temporary / REPLICATED, tensors)
            document = sealed({"format": FORMAT, **about}, tensors)
        else:
            parts = write_shards(temporary, tensors, sharded, shards)
            document = sealed({"format": SHARDED, **about, "parts": parts}, {})
        on_first(shards, lambda: _complete(temporary, final, document))
    except BaseException:
        if shards.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    on_first(shards, lambda: _remove_others(folder, keep, temporary))
    return final


def _begin(folder: Path, final: Path, shards: Shards) -> Path:
    """A new temporary folder; what killed processes left is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob(".checkpoint*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
    if final.exists():  # then .old is left over from a process that was killed
        shutil.rmtree(_old(final), ignore_errors=True)
    # Of a name that has been renamed, another machine may remember for seconds which folder it was.
    unique = "" if shards.size == 1 else f"-{secrets.token_hex(4)}"
    temporary = folder / f".checkpoint{unique}.tmp"
    temporary.mkdir()
    return temporary


def _complete(temporary: Path, final: Path, document: Mapping[str, Any]) -> None:
    write_json(temporary / "state.json", document)
    if final.exists():
        final.rename(_old(final))
    temporary.rename(final)


def _remove_others(folder: Path, keep: int, temporary: Path) -> None:
    sync_directory(folder)
    kept = list_checkpoints(folder)[-keep:]
    for path in [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]:
        if path not in kept:  # renamed first: a crash must not leave half of one
            shutil.rmtree(path.rename(temporary))


def _old(final: Path) -> Path:
    return final.with_name(f"{final.name}.old")


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, one for each step, oldest first."""
    return [path for _, path in sorted(_by_step(folder).items())]


def _by_step(folder: Path) -> dict[int, Path]:
    """The checkpoint of each step: step-XXXXXXXX.old only where step-XXXXXXXX is missing."""
    names = sorted(os.listdir(folder), reverse=True) if folder.is_dir() else []
    return {int(found[1]): folder / name for name in names if (found := _NAME.fullmatch(name))}


def load_checkpoint(
    path: Path, sharded: Collection[str] = (), shards: Shards = ONE_PROCESS
) -> Checkpoint:
    """The tensors and the metadata of a checkpoint, whatever number of processes wrote it.

    Of the tensors that `sharded` names, if they exist, only the rows of this process's latents are
    read. (If several processes wrote it, they recorded the names, and those count.) Checksums are
    verified by all processes, each of an equal part of all bytes. Raises ValueError, naming the
    file, if one is missing, damaged or of another version, or if the latents cannot be divided.
    """
    meta = on_first(shards, lambda: metadata(path))
    if meta["format"] == SHARDED:
        return read_shards(path, meta.get("parts"), shards), meta
    if shards.size == 1:
        tensors = contents = read_tensors(path / REPLICATED)
    else:
        tensors, contents = read_rows(path / REPLICATED, sharded, shards)
    if not is_sealed(meta, contents):
        raise ValueError(f"{path} was changed after it was written: its checksum differs")
    return tensors, meta


def metadata(path: Path) -> dict[str, Any]:
    """What state.json of a checkpoint holds; ValueError if it is damaged."""
    document = read_json(path / "state.json")
    meta = document if isinstance(document, dict) else {}
    if meta.get("format") not in (FORMAT, SHARDED):
        found, by = shown(meta.get("format", document)), written_by(meta.get("version"))
        raise ValueError(f"{path / 'state.json'} must have format {FORMAT!r}, got {found}{by}")
    if meta["format"] == SHARDED and not (CHECKSUM in meta and is_sealed(meta, {})):
        raise ValueError(
            f"{path / 'state.json'} was changed after it was written: its checksum differs"
        )
    return meta


def newest_intact(
    folders: Mapping[Path, Collection[str]], shards: Shards = ONE_PROCESS
) -> list[Checkpoint] | None:
    """The checkpoints of the newest step for which every folder has an intact one; None if there is
    no step for which every folder has one. All processes get those of the same step.

    `folders` says what `load_checkpoint` should take for sharded in each. Says which checkpoints it
    passes over, as they are damaged; ValueError if all are.
    """
    kept = on_first(shards, lambda: [_by_step(folder) for folder in folders])
    damage = None
    for step in sorted(set.intersection(*map(set, kept)), reverse=True):
        try:
            return [
                load_checkpoint(paths[step], sharded, shards)
                for paths, sharded in zip(kept, folders.values(), strict=True)
            ]
        except ValueError as error:
            damage = error
            if shards.rank == 0:
                say(f"{error}; trying the checkpoint before it", logging.WARNING)
    if damage is not None:
        raise ValueError(f"no checkpoint is intact: {damage}")
    return None
