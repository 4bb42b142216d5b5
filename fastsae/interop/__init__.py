"""SAE files of fastsae and other libraries: `load` detects the format, `save` writes one.

Supports SAELens, sparsify and dictionary_learning; reads Gemma Scope and OpenAI files too. Nothing
is unpickled, and sizes are checked before memory is allocated.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastsae.nn import SAE

from . import dictionary_learning, gemma_scope, native, openai, sae_lens, sparsify
from .checkpoint_io import open_file, write_file
from .hub import download

__all__ = ["FORMATS", "WRITABLE", "Format", "load", "save"]


class Format(NamedTuple):
    """How one library stores an SAE."""

    files: tuple[str, ...]
    """Names of the files in its directory; empty if it is a single .pt file of any name."""

    read: Callable[..., SAE]
    """The SAE from the contents of those files, in this order."""

    write: Callable[..., tuple[Any, ...]] | None = None
    """The contents of the files from an SAE; ValueError if the library does not support it."""


FORMATS = {
    "fastsae": Format(("config.json", "sae.safetensors"), native.read, native.write),
    "sae_lens": Format(("cfg.json", "sae_weights.safetensors"), sae_lens.read, sae_lens.write),
    "sparsify": Format(("cfg.json", "sae.safetensors"), sparsify.read, sparsify.write),
    "dictionary_learning": Format(
        ("config.json", "ae.pt"), dictionary_learning.read, dictionary_learning.write
    ),
    "gemma_scope": Format(("params.npz",), gemma_scope.read),
    "openai": Format((), openai.read),
}
WRITABLE = tuple(name for name, form in FORMATS.items() if form.write)


def load(source: str | Path, device: str | torch.device = "cpu") -> SAE:
    """Load an SAE in evaluation mode from fastsae's files or those of another library.

    Args:
        source: a directory written by fastsae, SAELens, sparsify or dictionary_learning, or a run
            directory; a Gemma Scope params.npz or its directory; an OpenAI .pt file; or, with the
            `hf` extra, the id of one of these on the Hugging Face Hub: owner/repository/directory.
        device: where to put the SAE.

    The SAE takes activations as the library that wrote it does. Raises ValueError for a missing,
    damaged or unknown file, naming it.
    """
    path = Path(source)
    if not path.exists():
        path = download(str(source), {name for form in FORMATS.values() for name in form.files})
    if (path / "sae").is_dir():
        path = path / "sae"
    form, files = detect(path)
    try:
        return form.read(*map(open_file, files)).to(device)
    except ValueError as error:
        if str(files[0].parent) in str(error):
            raise
        raise ValueError(f"{path}: {error}") from error


def detect(path: Path) -> tuple[Format, list[Path]]:
    """The format of a file or directory, and its files; ValueError lists the supported formats."""
    folder = path.parent if path.is_file() else path
    for form in FORMATS.values():
        files = [folder / name for name in form.files]
        if files and all(file.exists() for file in files) and path in (folder, *files):
            return form, files
    if path.is_file() and path.suffix == ".pt":
        return FORMATS["openai"], [path]
    known = [f"{' and '.join(form.files)} ({name})" for name, form in FORMATS.items() if form.files]
    raise ValueError(f"{path} holds no SAE: it must have {', '.join(known)}, or be a .pt (openai)")


def save(sae: SAE, folder: str | Path, form: str, **metadata: Any) -> None:
    """Write an SAE in the format of a library; ValueError if that does not support it, saying why.

    Args:
        sae: the SAE, which is not changed.
        folder: directory to write to, created if needed.
        form: "fastsae", "sae_lens", "sparsify" or "dictionary_learning".
        metadata: for "sae_lens": what its config records, such as model_name and hook_name.
    """
    if form not in WRITABLE:
        raise ValueError(f"the form must be one of {', '.join(WRITABLE)}, got {form!r}")
    files, _, write = FORMATS[form]
    assert write is not None
    contents = write(sae, **metadata)
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, content in reversed([*zip(files, contents, strict=True)]):  # the config is last
        write_file(Path(folder) / name, content)
