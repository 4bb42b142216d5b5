"""Files of an SAE from the Hugging Face hub."""

import re
from pathlib import Path

WANTED = "*.json", "*.safetensors", "*.npz", "*.pt"


def downloaded(source: str) -> Path:
    """The local copy of organisation/repository/folder; ValueError if that cannot be had."""
    parts = source.split("/")
    if len(parts) < 2 or not all(re.fullmatch(r"[\w.-]*\w[\w.-]*", part) for part in parts):
        raise ValueError(f"{source} does not exist")
    repository, folder = "/".join(parts[:2]), "/".join(parts[2:])
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError:
        raise ValueError(
            f"{source} does not exist; for the hub's, pip install 'fastsae[hf]'"
        ) from None
    patterns = [f"{folder}/{name}" if folder else name for name in WANTED]
    try:
        copy = Path(snapshot_download(repository, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        text = " ".join(str(error).split())[:200]
        raise ValueError(f"{source} does not exist, here or on the hub: {text}") from None
    if not (copy / folder).exists():
        raise ValueError(f"{repository} on the hub has no {folder}")
    return copy / folder
