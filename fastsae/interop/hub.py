"""Files of an SAE from the Hugging Face hub."""

import re
from pathlib import Path


def downloaded(source: str, files: tuple[str, ...]) -> Path:
    """The local copy of organisation/repository/folder, with those of these files that are there,
    or of one file of a repository; ValueError if that cannot be had."""
    parts = source.split("/")
    if len(parts) < 2 or not all(re.fullmatch(r"[\w.-]*\w[\w.-]*", part) for part in parts):
        raise ValueError(f"{source} does not exist")
    repository, inside = "/".join(parts[:2]), "/".join(parts[2:])
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError:
        raise ValueError(
            f"{source} does not exist; for the hub's, pip install 'fastsae-triton[hf]'"
        ) from None
    wanted = [f"{inside}/{name}" if inside else name for name in files]
    if Path(inside).suffix in (".pt", ".npz"):
        wanted = [inside]
    try:
        copy = Path(snapshot_download(repository, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        text = " ".join(str(error).split())[:200]
        raise ValueError(f"{source} does not exist, here or on the hub: {text}") from None
    if not (copy / inside).exists():
        raise ValueError(f"{repository} on the hub has no {inside}")
    return copy / inside
