"""Checkpoints: a folder each, whole or absent, of safetensors and JSON; the last few are kept."""

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
    """Write folder/step-XXXXXXXX and remove all but the last `keep` checkpoints.

    The checkpoint is written under another name, synced, then renamed, so that one that can be
    seen is whole; older ones go only after that.
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
        shutil.rmtree(old.rename(temporary))  # a name that is no checkpoint's, in case of a crash
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the JSON part of a checkpoint.

    Raises ValueError, naming the file, for one that is missing, damaged or of another version.
    """
    meta = read_json(path / "state.json")
    found = meta.get("format") if isinstance(meta, dict) else meta
    if found != FORMAT:
        raise ValueError(f"{path / 'state.json'} must have format {FORMAT!r}, got {found!r}")
    return read_tensors(path / "state.safetensors"), meta
