"""Writes files atomically, alone or several as a whole; nothing is ever pickled."""

import io
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .checksum import CHECKSUM, is_sealed
from .headers import read_tensors
from .read import read_json

Write = Callable[[Path], object]
"""Writes a file at the path given."""


def write_atomically(path: Path, write: Write) -> None:
    """Call write(temporary path), fsync that file, then rename it to path.

    A reader, or a run resumed after a crash at any moment, sees either the old file or the new one.
    """
    _replace({path: write})


def write_files(folder: Path, contents: Mapping[str, Mapping[str, Any]]) -> None:
    """Write an SAE's settings and then its tensors, by file name, replacing an older SAE as a
    whole.

    Every file is complete under its temporary name before the first one is renamed. Settings with
    a checksum are renamed first: they tell old tensors from new ones, which `fastsae.load` also
    finds under their temporary name. Without a checksum the old settings are removed first: a
    killed process leaves files that no loader takes for an SAE, rather than a mix of two.
    """
    folder.mkdir(parents=True, exist_ok=True)
    writers = {".json": _json_writer, ".safetensors": _tensor_writer, ".pt": _pt_writer}
    writes = {folder / name: writers[Path(name).suffix](c) for name, c in contents.items()}
    settings = next(iter(writes))
    if CHECKSUM in contents[settings.name]:
        finish(*writes)
        _replace(writes)
    else:
        _replace(dict(reversed(writes.items())), remove=settings)


def write_settings(path: Path, settings: Mapping[str, Any], tensors: Path) -> None:
    """Write an SAE's settings as `write_files` does, and rename its tensors, which are complete
    under their temporary name; without them if it fails."""
    _replace({path: _json_writer(settings)}, staged=[tensors])


def finish(settings: Path, tensors: Path) -> None:
    """Rename the tensors of an SAE whose writer was killed after it had renamed the settings: they
    exist only under the temporary name, which is about to be reused."""
    pending = temporary_of(tensors)
    with suppress(ValueError):  # no settings, no tensors, or incomplete ones
        staged, found = read_tensors(pending), read_json(settings)
        if isinstance(found, dict) and CHECKSUM in found and is_sealed(found, staged):
            del staged  # Windows does not rename a mapped file
            os.replace(pending, tensors)
            sync_directory(tensors.parent)


def _replace(
    writes: Mapping[Path, Write], remove: Path | None = None, staged: Sequence[Path] = ()
) -> None:
    """Write files of one folder under temporary names, remove a file, then rename them in order,
    last those that are staged: already complete under their temporary names."""
    first, *later = writes
    path = first
    try:
        for path, write in writes.items():
            _stage(temporary_of(path), write)
        if remove is not None:
            path = remove
            path.unlink(missing_ok=True)
        path = first
        os.replace(temporary_of(path), path)
    except BaseException as error:
        for unfinished in (*writes, *staged):
            temporary_of(unfinished).unlink(missing_ok=True)
        if isinstance(error, OSError | SafetensorError):
            reason = getattr(error, "strerror", None) or error
            raise OSError(f"{path} cannot be written: {reason}") from None
        raise
    for path in (*later, *staged):
        os.replace(temporary_of(path), path)
    sync_directory(path.parent)


def temporary_of(path: Path) -> Path:
    """The name under which a file is written before it is renamed."""
    return path.with_name(f".{path.name}.tmp")


def _stage(path: Path, write: Write) -> None:
    """Write a file with the mode that the umask gives (libraries create private ones); sync it."""
    path.unlink(missing_ok=True)
    with open(path, "xb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    write(path)
    path.chmod(mode)
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Make renames in a directory durable, where the system can open directories."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def claimed(folder: Path, wait: bool = False) -> Iterator[bool]:
    """Lock a folder for this process, creating it if needed; yields False if another one holds it.

    With wait, block until the other process releases it. A killed process holds no lock.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} must be a folder, but is a file")
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=-1 if wait else 0)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def write_json(path: Path, value: Any, *, compact: bool = False) -> None:
    """Write a JSON value; ValueError for NaN and Inf, which JSON cannot represent. The compact form
    has no spaces or line breaks, and no escapes of characters beyond ASCII."""
    write_atomically(path, _json_writer(value, compact))


def _json_writer(value: Any, compact: bool = False) -> Write:
    form: dict[str, Any] = {"indent": 2}
    if compact:
        form = {"ensure_ascii": False, "separators": (",", ":")}
    text = json.dumps(value, allow_nan=False, **form) + "\n"
    return lambda path: path.write_text(text, encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, sorted by name, to a safetensors file; OSError if it fails."""
    write_atomically(path, _tensor_writer(tensors))


def _tensor_writer(tensors: Mapping[str, Tensor]) -> Write:
    whole = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    return lambda path: save_file(whole, path)


def _pt_writer(tensors: Mapping[str, Tensor]) -> Write:
    state = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}

    def write(path: Path) -> None:
        buffer = io.BytesIO()  # to a full disk, torch.save raises a RuntimeError
        torch.save(state, buffer)
        path.write_bytes(buffer.getbuffer())

    return write
