"""Text to run a model on: files, folders, globs, and datasets."""

import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl")


def text_files(patterns: tuple[str, ...]) -> list[Path]:
    """The files that the patterns (paths, folders or globs) match, sorted for each pattern.

    A folder matches the text files at any depth in it. ValueError if a pattern matches none.
    """
    files: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
        elif path.is_file():
            found = [path]
        else:
            found = [Path(file) for file in sorted(glob.glob(pattern, recursive=True))]
        found = [file for file in found if file.is_file()]
        if not found:
            allowed = f"a file, a glob, or a folder with {', '.join(SUFFIXES)}"
            raise ValueError(f"no text found at {pattern!r}; give {allowed}")
        files += found
    return files


def file_documents(files: list[Path]) -> Iterator[str]:
    """The documents in files: one per line of a .jsonl file, or the whole file."""
    for file in files:
        if file.suffix == ".jsonl":
            yield from _json_lines(file)
        else:
            yield file.read_text(encoding="utf-8", errors="replace")


def _json_lines(file: Path) -> Iterator[str]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield str(json.loads(line)["text"])
            except (ValueError, KeyError, TypeError) as error:
                message = f'{file} line {number}: expected an object with a "text"'
                raise ValueError(message) from error


def dataset_documents(
    name: str, *, config: str | None, split: str, text_column: str
) -> Iterator[str]:
    """The text column of a dataset: a hub id, a folder it was saved to, or a folder of files."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError("--dataset needs a package: pip install 'fastsae-triton[hf]'") from error
    try:
        rows: Any
        if (Path(name) / "dataset_dict.json").is_file():
            rows = datasets.load_from_disk(name)[split]
        elif (Path(name) / "dataset_info.json").is_file():
            rows = datasets.load_from_disk(name)
        else:
            rows = datasets.load_dataset(name, config, split=split, streaming=True)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"cannot load split {split!r} of dataset {name!r}: {reason}") from error
    for row in rows:
        if text_column not in row:
            allowed = ", ".join(row)
            raise ValueError(f"dataset {name!r} has no column {text_column!r}, only {allowed}")
        yield str(row[text_column])
