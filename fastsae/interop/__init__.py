"""SAE files of fastsae and other libraries: `load` detects the format, `save` writes one.

Supports SAELens, sparsify, dictionary_learning and llamascopium; reads the files of Gemma Scope,
Gemma Scope 2, Qwen-Scope and OpenAI too. Nothing is unpickled, and sizes are checked before memory
is allocated.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastsae.distributed.parallelize import parallelize
from fastsae.files import read_json, write_files
from fastsae.nn import SAE
from fastsae.shards import Shards

from . import (
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    llamascopium,
    native,
    openai,
    qwen_scope,
    sae_lens,
    sparsify,
)
from .checkpoint_io import read_file
from .hub import download

__all__ = ["FORMATS", "WRITABLE", "Format", "contents", "load", "load_divided", "save"]


class Format(NamedTuple):
    """How one library stores an SAE."""

    files: tuple[str, ...]
    """Names of the files in its directory; empty if it is a single file of any name."""

    read: Callable[..., SAE]
    """The SAE from the contents of those files, in this order."""

    write: Callable[..., tuple[Any, ...]] | None = None
    """The contents of the files from an SAE; ValueError if the library does not support it."""

    setting: str = ""
    """A setting by which its config is told from that of another format with the same name."""

    suffix: str = ""
    """How the name of a single file ends."""

    describes: bool = False
    """Whether its config says where the activations come from."""


FORMATS = {
    "fastsae": Format(("config.json", "sae.safetensors"), native.read, native.write, "format"),
    "sae_lens": Format(
        ("cfg.json", "sae_weights.safetensors"),
        sae_lens.read,
        sae_lens.write,
        "d_sae",
        describes=True,
    ),
    "sparsify": Format(
        ("cfg.json", "sae.safetensors"), sparsify.read, sparsify.write, "num_latents"
    ),
    "dictionary_learning": Format(
        ("config.json", "ae.pt"), dictionary_learning.read, dictionary_learning.write, "trainer"
    ),
    "llamascopium": Format(
        ("config.json", "sae_weights.safetensors"),
        llamascopium.read,
        llamascopium.write,
        "sae_type",
        describes=True,
    ),
    "gemma_scope": Format(("params.npz",), gemma_scope.read),
    "gemma_scope_2": Format(
        ("config.json", "params.safetensors"), gemma_scope_2.read, None, "architecture"
    ),
    "qwen_scope": Format((), qwen_scope.read, suffix=".sae.pt"),
    "openai": Format((), openai.read, suffix=".pt"),
}
WRITABLE = tuple(name for name, form in FORMATS.items() if form.write)


def load(source: str | Path, device: str | torch.device = "cpu") -> SAE:
    """Load an SAE in evaluation mode from fastsae's files or those of another library.

    Args:
        source: a directory written by fastsae, SAELens, sparsify, dictionary_learning or
            llamascopium, or a run directory; a Gemma Scope params.npz or params.safetensors, or its
            directory; an OpenAI .pt or Qwen-Scope .sae.pt file; or, with the `hf` extra, the id of
            one of these on the Hugging Face Hub: owner/repository/directory.
        device: where to put the SAE.

    The SAE takes activations as the library that wrote it does. Raises ValueError for a missing,
    damaged or unknown file, naming it.
    """
    path = Path(source)
    if not path.exists():
        path = download(str(source), {name for form in FORMATS.values() for name in form.files})
    form, files = detect(path)
    try:
        return form.read(*map(read_file, files)).to(device)
    except ValueError as error:
        if str(files[0].parent) in str(error):
            raise
        raise ValueError(f"{path}: {error}") from error


def load_divided(source: Path, shards: Shards) -> SAE:
    """What `load` returns, with each process's latents; where they are divided, each one reads its
    own. ValueError for another library's files then."""
    if shards.latent == 1:
        return parallelize(load(source), shards)
    form, (config, *_) = detect(source)
    if form is not FORMATS["fastsae"]:
        raise ValueError(f"{source} is not fastsae's own: processes cannot divide its latents")
    return native.read_divided(config.parent, shards)


def detect(path: Path) -> tuple[Format, list[Path]]:
    """The format of a file or directory, which may be a run's, and its files; ValueError lists the
    supported formats, or those that the directory has files of."""
    named = candidates(path)
    if not named and (path / "sae").is_dir():
        path = path / "sae"
        named = candidates(path)
    found = named
    if len(named) > 1:
        found = {name: files for name, files in named.items() if has_setting(name, files[0])}
    if len(found) > 1:
        raise ValueError(
            f"{path} holds SAEs of {' and '.join(found)}: load one by its config, such as "
            f"{next(iter(found.values()))[0]}"
        )
    for name, files in found.items():
        return FORMATS[name], files
    if named:
        settings = " or ".join(FORMATS[name].setting for name in named)
        raise ValueError(
            f"{path} has files of {' and '.join(named)}, but its config has no setting {settings}"
        )
    for form in FORMATS.values():
        if form.suffix and path.is_file() and path.name.endswith(form.suffix):
            return form, [path]
    if any(path.glob("checkpoints/step-*")):
        raise ValueError(f"{path} holds no SAE yet: finish its run with --resume")
    known = [f"{' and '.join(form.files)} ({name})" for name, form in FORMATS.items() if form.files]
    single = [f"{form.suffix} ({name})" for name, form in FORMATS.items() if form.suffix]
    raise ValueError(
        f"{path} holds no SAE: it must have {', '.join(known)}, or be a {' or '.join(single)}"
    )


def candidates(path: Path) -> dict[str, list[Path]]:
    """The files that a file belongs to, or a directory has, by the formats that have such files."""
    folder = path.parent if path.is_file() else path
    files = {name: [folder / file for file in form.files] for name, form in FORMATS.items()}
    return {
        name: found
        for name, found in files.items()
        if found and path in (folder, *found) and all(file.exists() for file in found)
    }


def has_setting(name: str, config: Path) -> bool:
    """Whether a config has the setting by which a format is recognized."""
    if config.suffix != ".json":
        return True
    values = read_json(config)
    return isinstance(values, dict) and FORMATS[name].setting in values


def save(sae: SAE, folder: str | Path, form: str, **metadata: Any) -> None:
    """Write an SAE in the format of a library, replacing one of that format as a whole.

    Args:
        sae: the SAE, which is not changed.
        folder: directory to write to, created if needed.
        form: "fastsae", "sae_lens", "sparsify", "dictionary_learning" or "llamascopium".
        metadata: where the activations come from (see `fastsae.train.Origin`), such as model_name
            and hook_name; the configs of SAELens and llamascopium record it, others have no place
            for it.

    Raises ValueError if the library does not support the SAE, saying why.
    """
    write_files(Path(folder), contents(sae, form, **metadata))


def contents(sae: SAE, form: str, **metadata: Any) -> dict[str, Any]:
    """What `save` writes, by file name."""
    if form not in WRITABLE:
        raise ValueError(f"the format must be one of {', '.join(WRITABLE)}, got {form!r}")
    found = FORMATS[form]
    assert found.write is not None
    written = found.write(sae, **metadata if found.describes else {})
    return dict(zip(found.files, written, strict=True))
