"""Reads JSON files and opens others: every one that is damaged or unreadable is a single error."""

import json
import math
import reprlib
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 1 << 20
MAX_JSON_DEPTH = 32


def open_file(path: Path) -> BufferedReader:
    """Open a regular file to read; ValueError if there is none, PermissionError if it is not
    readable."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would block, a device never end
            raise ValueError(f"{path} is not a regular file")
        return path.open("rb")
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path} does not exist") from None
    except PermissionError:
        raise PermissionError(f"{path} cannot be read: permission denied") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """The value in a JSON file; a ValueError names the file if it is missing, damaged or too
    large."""
    with open_file(path) as file:
        content = file.read(max_bytes + 1)
    try:
        if len(content) > max_bytes:
            raise ValueError(f"it exceeds {max_bytes} bytes")
        return parse_json(content)
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from None


def parse_json(content: bytes) -> Any:
    """A JSON value; ValueError for one with duplicate keys, numbers that are not finite or integers
    beyond 64 bits, or more than MAX_JSON_DEPTH levels of nesting."""
    try:
        value = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_number,
            parse_float=_number,
            parse_int=_integer,
        )
    except RecursionError:
        value = None
        level: list[Any] = [None]
    else:
        level = [value]
        for _ in range(MAX_JSON_DEPTH):
            level = [inner for outer in level for inner in _inside(outer)]
    if level:
        raise ValueError(f"it nests more than {MAX_JSON_DEPTH} levels deep")
    return value


def _inside(value: Any) -> Any:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"it has {shown(twice)} twice")
    return found


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"it has the number {shown(text)}")
    return value


def _integer(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**64:
        raise ValueError(f"it has an integer of {len(text)} digits")
    return int(text)


def shown(value: Any) -> str:
    """The repr of a value from a file, cut short: nested values can share parts, so that a whole
    repr may be far larger than the file."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 2, 100, 100
    return short.repr(value)
