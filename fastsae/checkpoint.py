"""Checkpoints: one directory each, written atomically; only the newest are kept."""

import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fastsae.files import (
    is_sealed,
    read_json,
    read_tensors,
    sealed,
    shown,
    sync_directory,
    write_json,
    write_tensors,
)
from fastsae.progress import say
from fastsae.version import __version__, written_by

FORMAT = "fastsae.checkpoint.1"
_NAME = re.compile(r"step-(\d{8,})(\.old)?")

Checkpoint = tuple[dict[str, Tensor], dict[str, Any]]
"""The tensors and the metadata."""


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], keep: int
) -> Path:
    """Write folder/step-XXXXXXXX, then remove all but the newest `keep` checkpoints.

    A checkpoint is written under a temporary name, synced, then renamed, so every one that is
    listed is complete. One of the same step is renamed to step-XXXXXXXX.old first. That one counts
    if a crash comes between the two renames, so that a step once saved always has a checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final, temporary = folder / f"step-{step:08d}", folder / ".checkpoint.tmp"
    old = folder / f"{final.name}.old"
    shutil.rmtree(temporary, ignore_errors=True)
    if final.exists():  # then .old is left over from a process that was killed
        shutil.rmtree(old, ignore_errors=True)
    temporary.mkdir()
    tensors = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    about = {"format": FORMAT, "version": __version__, "step": step, **meta}
    try:
        write_tensors(temporary / "state.safetensors", tensors)
        write_json(temporary / "state.json", sealed(about, tensors))
        if final.exists():
            final.rename(old)
        temporary.rename(final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_directory(folder)
    kept = list_checkpoints(folder)[-keep:]
    for path in [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]:
        if path not in kept:  # renamed first: a crash must not leave half of one
            shutil.rmtree(path.rename(temporary))
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, one for each step, oldest first."""
    return [path for _, path in sorted(_by_step(folder).items())]


def _by_step(folder: Path) -> dict[int, Path]:
    """The checkpoint of each step: step-XXXXXXXX.old only where step-XXXXXXXX is missing."""
    names = sorted(os.listdir(folder), reverse=True) if folder.is_dir() else []
    return {int(found[1]): folder / name for name in names if (found := _NAME.fullmatch(name))}


def load_checkpoint(path: Path) -> Checkpoint:
    """The tensors and the metadata of a checkpoint.

    Raises ValueError, naming the file, if one is missing, damaged or of another version.
    """
    document = read_json(path / "state.json")
    meta = document if isinstance(document, dict) else {}
    if meta.get("format") != FORMAT:
        found, by = shown(meta.get("format", document)), written_by(meta.get("version"))
        raise ValueError(f"{path / 'state.json'} must have format {FORMAT!r}, got {found}{by}")
    tensors = read_tensors(path / "state.safetensors")
    if not is_sealed(meta, tensors):
        raise ValueError(f"{path} was changed after it was written: its checksum differs")
    return tensors, meta


def newest_intact(folders: Sequence[Path]) -> list[Checkpoint] | None:
    """The checkpoints of the newest step for which every folder has an intact one; None if there is
    no step for which every folder has one.

    Says which ones it passes over, as they are damaged; ValueError if all are.
    """
    kept = [_by_step(folder) for folder in folders]
    damage = None
    for step in sorted(set.intersection(*map(set, kept)), reverse=True):
        try:
            return [load_checkpoint(paths[step]) for paths in kept]
        except ValueError as error:
            damage = error
            say(f"{error}; trying the checkpoint before it", logging.WARNING)
    if damage is not None:
        raise ValueError(f"no checkpoint is intact: {damage}")
    return None
