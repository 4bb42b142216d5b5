"""fastsae convert: converts an SAE from one library's format to another's."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import tyro

from fastsae.interop import WRITABLE, load, save

if TYPE_CHECKING:
    Form: TypeAlias = str
else:
    Form = Literal[WRITABLE]


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Convert a trained SAE to another library's format.

    The input format is detected: fastsae, SAELens, sparsify or dictionary_learning files, a Gemma
    Scope params.npz, an OpenAI .pt file, or the id of one of these on the Hugging Face Hub.
    """

    source: tyro.conf.Positional[str]
    """A directory, a file, or owner/repository/directory on the Hub."""

    out: tyro.conf.Positional[Path]
    """Output directory; must be new or empty."""

    to: Form
    """Format to write."""


def convert(command: Convert) -> None:
    out = command.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not an empty folder: choose another one")
    sae = load(command.source)
    save(sae, out, command.to)
    files = ", ".join(sorted(path.name for path in out.iterdir()))
    print(f"{sae.d_sae} latents of width {sae.d_in}, {sae.activation.cfg.name}: {out}/{files}")
