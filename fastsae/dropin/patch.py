"""Accelerates all SAEs that a library creates, wherever its own programs create them.

While a library is patched, the constructors of its SAEs first change the object's class to the
accelerated one. That of a subclass does so, too, when it calls the library's.
"""

from collections.abc import Callable
from functools import wraps
from threading import Lock
from typing import Any

from .classes import SUPPORTED, fast_class, supported_classes

_lock = Lock()
_patches: dict[str, list["Patch"]] = {name: [] for name in SUPPORTED}
"""The patches of each library that were not undone, the latest last."""

_constructors: dict[type, Callable[..., None] | None] = {}
"""What patched classes had as their own __init__, or None if they inherit it."""


class Patch:
    """The SAEs of a library are accelerated when they are created, until `restore` or the end of
    its `with` block. ValueError for an unknown library, or one that is not installed."""

    def __init__(self, library: str, exact_compat: bool = False):
        if library not in SUPPORTED:
            raise ValueError(f"the library must be one of {', '.join(SUPPORTED)}, got {library!r}")
        self.library, self.exact_compat = library, exact_compat
        try:
            classes = supported_classes(library)
        except ModuleNotFoundError as error:
            raise ValueError(f"{library} cannot be imported: {error}") from error
        with _lock:
            if not _patches[library]:
                for kind in classes:
                    _constructors[kind] = vars(kind).get("__init__")
                    kind.__init__ = accelerating(kind.__init__, library)
            _patches[library].append(self)

    def restore(self) -> None:
        """Create the library's own SAEs again, unless another patch of it is left."""
        with _lock:
            patches = _patches[self.library]
            if self not in patches:
                return
            patches.remove(self)
            if patches:
                return
            for kind in supported_classes(self.library):
                original = _constructors.pop(kind)
                if original is None:
                    del kind.__init__
                else:
                    kind.__init__ = original

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()


def unpatch(library: str) -> None:
    """Undo all patches of a library; ValueError if there is none."""
    if not _patches.get(library):
        raise ValueError(f"restore() expects a library that was accelerated, got {library!r}")
    for patch in [*_patches[library]]:
        patch.restore()


def accelerating(constructor: Callable[..., None], library: str) -> Callable[..., None]:
    """A constructor that first accelerates the object."""

    @wraps(constructor)
    def construct(self: Any, *arguments: Any, **settings: Any) -> None:
        latest, fast = _patches[library][-1:], fast_class(type(self))
        if latest and fast is not None and type(self) is not fast:
            object.__setattr__(self, "__class__", fast)
            if latest[0].exact_compat:
                vars(self)["exact_compat"] = True
        constructor(self, *arguments, **settings)

    return construct
