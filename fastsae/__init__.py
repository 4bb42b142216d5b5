"""Train sparse autoencoders fast."""

import sys
from importlib import import_module
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__

_PROGRAM_NAMES = "fastsae", "-m"
"""What Python calls the program while it starts the command line, whose help needs no torch."""

if TYPE_CHECKING or PurePath(*sys.argv[:1]).stem not in _PROGRAM_NAMES:
    from .public import *  # noqa: F403


def __getattr__(name: str) -> Any:
    """The command line imports what is public at its first use."""
    public = import_module("fastsae.public")
    if name == "__all__" or name in public.__all__:
        return getattr(public, name)
    if name in globals():  # a package that `public` imports
        return globals()[name]
    raise AttributeError(f"module 'fastsae' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *import_module("fastsae.public").__all__]
