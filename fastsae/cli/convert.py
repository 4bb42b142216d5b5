"""fastsae convert: converts an SAE from one library's format to another's."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastsae.interop import load, save

from .parse import filled, read_words


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Convert a trained SAE to another library's files.

    The source is recognized by its files: fastsae, SAELens, sparsify, dictionary_learning, Gemma
    Scope's params.npz, or OpenAI's state dict; or it is an id on the Hugging Face hub.
    """

    source: str
    """A directory, a file, or organization/repository/directory on the hub."""

    out: Path
    """Output directory; it must be new or empty."""

    to: Literal["fastsae", "sae_lens", "sparsify", "dictionary_learning"]
    """Library whose files to write."""


def main(words: Sequence[str]) -> str:
    command = filled(Convert, read_words(words), ["source", "out"])
    out = command.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not an empty directory: choose another one")
    sae = load(command.source)
    save(sae, out, command.to)
    files = ", ".join(sorted(path.name for path in out.iterdir()))
    return f"{sae.d_sae} latents of width {sae.d_in}, {sae.activation.cfg.name}: {out}/{files}"
