"""fastsae convert: converts an SAE from one library's format to another's."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastsae.files import claimed, write_files
from fastsae.interop import FORMATS, contents, load
from fastsae.train.origin import stored_origin

from .parse import filled, read_words

UNFINISHED = ".converting"
"""Marks a directory to which a process is writing, or was when it was killed."""


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Convert a trained SAE to another library's files.

    The source is recognized by its files: fastsae, SAELens, sparsify, dictionary_learning,
    llamascopium, Gemma Scope 1 or 2, Qwen-Scope, or OpenAI's state dict; or it is an id on the
    Hugging Face hub.
    """

    source: str
    """A directory, a file, or organization/repository/directory on the hub."""

    out: Path
    """Output directory; it must be new or empty."""

    to: Literal["fastsae", "sae_lens", "sparsify", "dictionary_learning", "llamascopium"]
    """Library whose files to write."""


def main(words: Sequence[str]) -> str:
    command = filled(Convert, read_words(words), ["source", "out"])
    out = command.out
    check_free(out)
    sae = load(command.source)
    files = contents(sae, command.to, **stored_origin(Path(command.source)))
    with claimed(out) as mine:
        if not mine:
            raise ValueError(f"another process is writing to {out}")
        check_free(out)  # again: another process may have finished in the meantime
        (out / UNFINISHED).touch()
        for name in {name for form in FORMATS.values() for name in form.files}:
            (out / name).unlink(missing_ok=True)  # may be of another format
        write_files(out, files)
        (out / UNFINISHED).unlink()
    (out / ".lock").unlink(missing_ok=True)
    names = ", ".join(sorted(files))
    return f"{sae.d_sae} latents of width {sae.d_in}, {sae.activation.cfg.name}: {out}/{names}"


def check_free(out: Path) -> None:
    """ValueError unless the directory is new or empty, or holds what a process that was killed has
    left of a conversion."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is not a directory: choose another one")
    if out.is_dir() and visible(out) and not (out / UNFINISHED).exists():
        raise ValueError(f"{out} is not an empty directory: choose another one")


def visible(out: Path) -> list[Path]:
    """What a directory holds, except for hidden files: killed processes leave those."""
    return [path for path in out.iterdir() if not path.name.startswith(".")]
