"""The version of fastsae, which SAEs, checkpoints and runs record."""

from typing import Any

__version__ = "0.1.0"


def written_by(version: Any) -> str:
    """What to add to an error about a file of another version; nothing for files of this one."""
    if not isinstance(version, str) or version == __version__:
        return ""
    return f" (written by fastsae {version[:20]!r}, this is {__version__})"
