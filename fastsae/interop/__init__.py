"""SAEs in other libraries' files: `load` recognises them, `save` writes them.

SAELens, sparsify, dictionary_learning, and, to read, Gemma Scope and OpenAI's. Nothing is ever
unpickled, and what a file claims to hold is checked before memory is taken for it.
"""

from pathlib import Path
from types import ModuleType

import torch

import fastsae.nn as nn
from fastsae.nn import SAE

from . import dictionary_learning, gemma_scope, openai, sae_lens, sparsify
from .hub import downloaded

FOLDERS: tuple[ModuleType, ...] = (sae_lens, sparsify, dictionary_learning, gemma_scope)
KNOWN = {module.NAME: module.FILES for module in FOLDERS}
KNOWN["fastsae"] = "config.json", "sae.safetensors"
WRITTEN = "fastsae", sae_lens.NAME, sparsify.NAME, dictionary_learning.NAME

__all__ = ["FOLDERS", "WRITTEN", "format_of", "load", "save"]


def load(source: str | Path, device: str | torch.device = "cpu") -> SAE:
    """An SAE in evaluation mode, whoever wrote it: for activations as its library takes them.

    source: a folder that fastsae, SAELens, sparsify or dictionary_learning wrote, or the folder of
    a run; a params.npz of Gemma Scope, or its folder; a .pt file of OpenAI's; or, with the `hf`
    extra, the id of one of these on the Hugging Face hub, organisation/repository/folder.
    Raises ValueError for a missing, damaged or foreign file, naming it.
    """
    path = Path(source)
    if not path.exists():
        path = downloaded(str(source), tuple({name for files in KNOWN.values() for name in files}))
    if (path / "sae").is_dir():
        path = path / "sae"
    module = format_of(path)
    where = path.parent if path.is_file() and module is not openai else path
    if module is nn:
        return nn.load(where, device)
    try:
        return module.read(where).to(device)
    except ValueError as error:
        if str(where) in str(error):
            raise
        raise ValueError(f"{where}: {error}") from error


def format_of(path: Path) -> ModuleType:
    """The module that reads a file or folder; ValueError says what is recognised."""
    if path.is_file():
        if path.name in gemma_scope.FILES:
            return gemma_scope
        if path.suffix == ".pt" and path.name not in dictionary_learning.FILES:
            return openai
        path = path.parent
    for module in FOLDERS:
        if all((path / name).exists() for name in module.FILES):
            return module
    if all((path / name).exists() for name in KNOWN["fastsae"]):
        return nn
    known = [f"{' and '.join(files)} ({name})" for name, files in KNOWN.items()]
    raise ValueError(f"{path} holds no SAE: it must have {', '.join(known)}, or be a .pt (openai)")


def save(sae: SAE, folder: str | Path, form: str) -> None:
    """Write an SAE as another library's files; ValueError if it has no such SAEs, saying why."""
    if form not in WRITTEN:
        raise ValueError(f"the form must be one of {', '.join(WRITTEN)}, got {form!r}")
    if form == "fastsae":
        sae.save(folder)
        return
    (module,) = [module for module in FOLDERS if form == module.NAME]
    module.write(sae, Path(folder))
