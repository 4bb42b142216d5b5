"""fastsae convert: an SAE from one library's files to another's."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import tyro

from fastsae.interop import WRITTEN, load, save

if TYPE_CHECKING:
    Form: TypeAlias = str
else:
    Form = Literal[WRITTEN]


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Write a trained SAE as another library's files.

    It is recognised by its files: of fastsae, SAELens, sparsify or dictionary_learning, Gemma
    Scope's params.npz, OpenAI's state dict; or an id on the Hugging Face hub.
    """

    source: tyro.conf.Positional[str]
    """A folder, a file, or organisation/repository/folder on the hub."""

    out: tyro.conf.Positional[Path]
    """Folder for the files; it must be new or empty."""

    to: Form
    """Whose files to write."""


def convert(command: Convert) -> None:
    out = command.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not an empty folder: choose another one")
    sae = load(command.source)
    save(sae, out, command.to)
    files = ", ".join(sorted(path.name for path in out.iterdir()))
    print(f"{sae.d_sae} latents of width {sae.d_in}, {sae.activation.cfg.name}: {out}/{files}")
