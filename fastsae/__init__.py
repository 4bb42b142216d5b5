"""Train sparse autoencoders fast."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__

if TYPE_CHECKING:
    from .public import *  # noqa: F403


def __getattr__(name: str) -> Any:
    """What is public is imported at its first use: the command line's help needs no torch."""
    public = import_module("fastsae.public")
    if name == "__all__" or name in public.__all__:
        return getattr(public, name)
    if name in globals():  # a package that `public` imports
        return globals()[name]
    raise AttributeError(f"module 'fastsae' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *import_module("fastsae.public").__all__]
