"""JSON and safetensors files, written atomically; nothing is ever pickled."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call write(temporary path), fsync that file, then rename it to path.

    A reader, or a run resumed after a crash at any moment, sees either the old file or the new one.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


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


def write_json(path: Path, value: Any) -> None:
    """Write a JSON value; ValueError for NaN and Inf, which JSON cannot represent."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: Path, max_bytes: int | None = None) -> Any:
    """The value in a JSON file; a ValueError names the file if it is missing, damaged or too
    large."""
    try:
        if max_bytes is not None and path.stat().st_size > max_bytes:
            raise ValueError(f"it exceeds {max_bytes} bytes")
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path} does not exist") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, sorted by name, to a safetensors file; OSError if it fails."""
    whole = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    try:
        write_atomically(path, lambda temporary: save_file(whole, temporary))
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; a ValueError names the file if missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from None
