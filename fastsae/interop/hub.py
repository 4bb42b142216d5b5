"""SAE files from the Hugging Face Hub."""

import re
from collections.abc import Iterable
from pathlib import Path


def download(source: str, files: Iterable[str]) -> Path:
    """The local copy of owner/repository/directory, with those of the named files that it has, or
    of a single .pt or .npz file in a repository; ValueError if it cannot be downloaded."""
    parts = source.split("/")
    if len(parts) < 2 or not all(re.fullmatch(r"[\w.-]*\w[\w.-]*", part) for part in parts):
        raise ValueError(f"{source} does not exist")
    repository, inside = "/".join(parts[:2]), "/".join(parts[2:])
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError:
        raise ValueError(
            f"{source} does not exist; to load from the Hub, pip install 'fastsae-triton[hf]'"
        ) from None
    wanted = [f"{inside}/{name}" if inside else name for name in files]
    if Path(inside).suffix in (".pt", ".npz"):
        wanted = [inside]
    try:
        copy = Path(snapshot_download(repository, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        text = " ".join(str(error).split())[:200]
        raise ValueError(f"{source} does not exist, locally or on the Hub: {text}") from None
    if not (copy / inside).exists():
        raise ValueError(f"{repository} on the Hub has no {inside or 'files of an SAE'}")
    return copy / inside
