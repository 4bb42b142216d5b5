"""Checkpoints: one directory each, written atomically; only the newest are kept."""

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastsae.files import read_json, read_tensors, sync_directory, write_json, write_tensors

FORMAT = "fastsae.checkpoint.1"
_NAME = re.compile(r"step-(\d{8})")


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], keep: int
) -> Path:
    """Write folder/step-XXXXXXXX, then remove all but the newest `keep` checkpoints.

    A checkpoint is written under a temporary name, synced, then renamed, so every one that is
    listed is complete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:08d}"
    temporary = folder / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        write_tensors(temporary / "state.safetensors", tensors)
        write_json(temporary / "state.json", {"format": FORMAT, "step": step, **meta})
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_directory(folder)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old.rename(temporary))  # renamed first: a crash must not leave half of one
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the metadata of a checkpoint.

    Raises ValueError, naming the file, if one is missing, damaged or of another version.
    """
    meta = read_json(path / "state.json")
    found = meta.get("format") if isinstance(meta, dict) else meta
    if found != FORMAT:
        raise ValueError(f"{path / 'state.json'} must have format {FORMAT!r}, got {found!r}")
    return read_tensors(path / "state.safetensors"), meta
