"""Pushes an SAE to the Hugging Face hub."""

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from fastsae.nn import SAE
from fastsae.version import __version__

from .config import PushConfig
from .repository import LAYOUTS, write_repository

REPLACED = ["curves.png", *(f"{name}/*" for name in LAYOUTS)]
"""What a push removes of an earlier one, if it does not write it again."""


class Pushed(NamedTuple):
    """What became of a push."""

    url: str
    """Of the repository."""

    missing: dict[str, str]
    """Why a library's layout was left out, by its name."""


def push_to_hub(
    sae: SAE, repository: str, *, run: str | Path | None = None, **settings: Any
) -> Pushed:
    """Push an SAE to the Hugging Face hub, with a model card and the layouts of other libraries.

    `fastsae.load(repository)` then returns the same SAE. Needs the `hf` extra and a token, from
    `hf auth login` or $HF_TOKEN.

    Args:
        repository: organization/name, created if needed.
        run: directory of the run that trained it: its numbers and curves go into the card.
        settings: of `PushConfig`, such as private and license.

    Raises ValueError for invalid settings, and if the hub refuses.
    """
    config = PushConfig(repository=repository, **settings)
    with tempfile.TemporaryDirectory() as folder:
        missing = write_repository(sae, Path(folder), config, None if run is None else Path(run))
        return Pushed(upload(Path(folder), config), missing)


def upload(folder: Path, config: PushConfig) -> str:
    """Upload a folder that `write_repository` wrote, as one commit; the repository's address."""
    name = config.repository
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import (
            HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # of its HTTP library
        )
    except ImportError:
        raise ValueError(
            "pushing to the Hub requires huggingface_hub: pip install 'fastsae-triton[hf]'"
        ) from None
    api = HfApi(library_name="fastsae", library_version=__version__)
    try:
        url = api.create_repo(name, private=config.private, exist_ok=True)
        # Of a repository that exists, the visibility stays as it is.
        if config.private and not api.repo_info(name).private:
            raise ValueError("the repository already exists and is public; --private was given")
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message=config.message,
            delete_patterns=REPLACED,
        )
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"cannot push to {name}: {reason(error)}") from error
    return str(url)


def reason(error: Exception) -> str:
    """Why the hub refused, in one line, with what to do about a token that it does not know."""
    parts = [str(error), str(error.__cause__ or "")]
    text = " ".join((parts[0] if parts[1] in parts[0] else " ".join(parts)).split())[:300]
    if getattr(getattr(error, "response", None), "status_code", None) == 401:
        text += "; log in with `hf auth login`, or set HF_TOKEN to a token with write access"
    return text
