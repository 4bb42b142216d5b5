"""fastsae push: a trained SAE on the Hugging Face hub."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastsae.hub import PushConfig, upload, write_repository
from fastsae.interop import load

from .parse import filled, read_words


@dataclass(frozen=True, kw_only=True)
class Push(PushConfig):
    """Push a trained SAE to the Hugging Face hub, with a model card.

    The card has the run's numbers and curves, and how to load the SAE in each library. SAELens and
    sparsify load it from the repository, if they support it. A token comes from `hf auth login` or
    $HF_TOKEN.
    """

    run: Path
    """Directory of a run or of a saved SAE, from fastsae or another library."""

    dry_run: Path | None = None
    """Write the repository to this directory, new or empty, and upload nothing."""


def main(words: Sequence[str]) -> str:
    command = filled(Push, read_words(words), ["run", "repository"])
    sae, out = load(command.run), command.dry_run
    if out is not None:
        missing = write_repository(sae, out, command, command.run)
        return f"{listing(out, missing)}\nnothing was uploaded: see {out / 'README.md'}"
    with tempfile.TemporaryDirectory() as folder:
        missing = write_repository(sae, Path(folder), command, command.run)
        url = upload(Path(folder), command)
        return f"{listing(Path(folder), missing)}\npushed to {url}"


def listing(folder: Path, missing: dict[str, str]) -> str:
    """The files of a repository with their sizes, and the layouts that it lacks."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"  {size(path):>10}  {path.relative_to(folder).as_posix()}" for path in files]
    return "\n".join([*lines, *(f"  {'-':>10}  {name}: {why}" for name, why in missing.items())])


def size(path: Path) -> str:
    length = path.stat().st_size
    return f"{length / 1e6:,.1f} MB" if length >= 1e6 else f"{length / 1e3:,.1f} kB"
