"""Text to run a model on: files, folders, globs, and datasets."""

import bz2
import codecs
import glob
import gzip
import io
import json
import lzma
import tokenize
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Document = str | list[int]
"""Text, or the ids of its tokens."""

SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl")
OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda file: _arrow().input_stream(file, compression="zstd"),
}
MARKS = {  # UTF-32 first: its little-endian mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}


class Row(NamedTuple):
    """A value of a file or dataset, and the words that name its place in an error."""

    where: str
    value: Any


class Documents:
    """The documents that `read` makes of rows, with the numbers of their rows.

    Rows without a value are skipped and counted, each once.
    """

    def __init__(self, rows: Callable[[], Iterator[Row]], read: Callable[[Any], Document]):
        self.skipped = 0
        self._rows, self._read = rows, read
        self._counted = 0
        """Rows that have been looked at."""

    def __call__(self, start: int = 0) -> Iterator[tuple[int, Document]]:
        """The documents from a row on."""
        for number, (where, value) in enumerate(islice(self._rows(), start, None), start):
            first_time, self._counted = number >= self._counted, max(self._counted, number + 1)
            if value is None:
                self.skipped += first_time
                continue
            try:
                document = self._read(value)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            yield number, document


def text_of(value: Any, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Text as it is, or a list of chat messages in the tokenizer's chat template."""
    if isinstance(value, str):
        return value
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(first, dict) and {"role", "content"} <= first.keys():
        return _chat(value, tokenizer)
    if isinstance(first, int):
        raise ValueError("expected text, found token ids: name the column with tokens_column")
    raise ValueError(f"expected text or chat messages, found {_kind(value)}")


def _chat(messages: list[Any], tokenizer: "PreTrainedTokenizerBase") -> str:
    if not tokenizer.chat_template:
        raise ValueError("found chat messages, but the model's tokenizer has no chat template")
    try:
        from jinja2 import TemplateError
    except ImportError as error:
        raise ValueError("chat templates need a package: pip install jinja2") from error
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (TemplateError, KeyError, TypeError) as error:
        raise ValueError(f"the chat template does not take these messages: {error}") from error


def tokens_of(value: Any, vocabulary: int) -> list[int]:
    """The token ids in a list or array, all below `vocabulary`."""
    ids = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(ids, list) or any(type(token) is not int for token in ids):
        raise ValueError(f"expected a list of token ids, found {_kind(value)}")
    for token in ids:
        if not 0 <= token < vocabulary:
            raise ValueError(f"token id {token} is outside the model's vocabulary of {vocabulary}")
    return ids


def _kind(value: Any) -> str:
    if isinstance(value, list) and value:
        return f"a list of {type(value[0]).__name__}"
    return "an empty list" if value == [] else type(value).__name__


def text_files(patterns: tuple[str, ...]) -> list[Path]:
    """The files that the patterns (paths, folders or globs) match, sorted for each pattern.

    A folder matches the text files at any depth in it, compressed or not. ValueError if a pattern
    matches none.
    """
    files: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if _plain(file).suffix in SUFFIXES)
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


def _plain(file: Path) -> Path:
    """The name of a file without the suffix of its compression."""
    return file.with_suffix("") if file.suffix in OPENERS else file


def is_json_lines(file: Path) -> bool:
    return _plain(file).suffix == ".jsonl"


def file_rows(files: list[Path], column: str) -> Iterator[Row]:
    """The rows of files: the column of every line of a .jsonl file, or the whole file."""
    for file in files:
        with _opened(file) as text:
            if is_json_lines(file):
                yield from _json_rows(file, text, column)
            else:
                whole = text.read()
                if "\0" in whole:
                    raise ValueError(f"{file} holds NUL characters: it is not text in UTF-8")
                yield Row(str(file), whole)


def _json_rows(file: Path, lines: io.TextIOWrapper, column: str) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)[column]
        except (ValueError, KeyError, TypeError) as error:
            message = f'{file} line {number}: expected an object with a "{column}"'
            raise ValueError(message) from error
        yield Row(f'{file} line {number}, "{column}"', value)


@contextmanager
def _opened(file: Path) -> Iterator[io.TextIOWrapper]:
    """A file's text, decompressed and decoded; ValueError if it cannot be."""
    opener = OPENERS.get(file.suffix, lambda file: file.open("rb"))
    encoding = "utf-8"
    try:
        with opener(file) as stream:
            encoding = _encoding(file, stream)
        with opener(file) as stream, io.TextIOWrapper(stream, encoding=encoding) as text:
            yield text
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not {encoding} text ({error.reason} at byte {error.start}): "
            "convert it with iconv -t UTF-8"
        ) from error
    except (gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        raise ValueError(f"cannot read {file}: {error}") from error


def _encoding(file: Path, stream: Any) -> str:
    """By the byte order mark, or the coding line of Python source; otherwise UTF-8."""
    start = stream.read(1024)
    for mark, encoding in MARKS.items():
        if start.startswith(mark):
            return encoding
    if _plain(file).suffix != ".py":
        return "utf-8"
    try:
        return tokenize.detect_encoding(io.BytesIO(start).readline)[0]
    except SyntaxError:  # an unknown coding, or none and not UTF-8: reading will tell
        return "utf-8"


def _arrow() -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise ValueError("reading .zst needs pyarrow: pip install 'fastsae-triton[hf]'") from error
    return pyarrow


def dataset_rows(name: str, *, config: str | None, split: str, column: str) -> Iterator[Row]:
    """The column of a dataset: a hub id, a folder it was saved to, or a folder of files."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError("--dataset needs a package: pip install 'fastsae-triton[hf]'") from error
    try:
        rows: Any
        marks = ("dataset_dict.json", "dataset_info.json")
        if any((Path(name) / mark).is_file() for mark in marks):
            rows = _saved_rows(datasets.load_from_disk(name), config, split)
        else:
            rows = datasets.load_dataset(name, config, split=split, streaming=True)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"cannot load split {split!r} of dataset {name!r}: {reason}") from error
    for number, row in enumerate(rows):
        if column not in row:
            allowed = ", ".join(row)
            raise ValueError(f"dataset {name!r} has no column {column!r}, only {allowed}")
        yield Row(f"dataset {name!r} row {number}, column {column!r}", row[column])


def _saved_rows(saved: Any, config: str | None, split: str) -> Any:
    """The rows of a dataset that was saved to disk, with one split or several; ValueError if it was
    saved from another config or without that split."""
    several = isinstance(saved, dict)
    splits = [*saved] if several else [str(saved.split or "train")]
    if split not in splits and (several or split != "train"):  # the default: may not be asked for
        raise ValueError(f"it was saved with split {' and '.join(splits)}")
    rows: Any = saved[split] if several else saved
    if config not in (None, rows.info.config_name):
        raise ValueError(f"it was saved with config {rows.info.config_name}, not {config!r}")
    return rows
