"""Which classes can be accelerated, and the accelerated class of each, and of their subclasses."""

from functools import cache
from importlib import import_module
from typing import Any

from torch import nn

SUPPORTED = {
    "sparsify": ("SparseCoder",),
    "sae_lens": (
        "StandardSAE",
        "StandardTrainingSAE",
        "TopKSAE",
        "TopKTrainingSAE",
        "AbsTopKSAE",
        "AbsTopKTrainingSAE",
        "BatchTopKTrainingSAE",
        "MatryoshkaBatchTopKTrainingSAE",
        "JumpReLUSAE",
        "JumpReLUTrainingSAE",
        "GatedSAE",
        "GatedTrainingSAE",
        "Transcoder",
        "SkipTranscoder",
        "JumpReLUTranscoder",
        "JumpReLUSkipTranscoder",
    ),
    "dictionary_learning": (
        "AutoEncoder",
        "AutoEncoderNew",
        "AutoEncoderTopK",
        "BatchTopKSAE",
        "MatryoshkaBatchTopKSAE",
        "GatedAutoEncoder",
        "JumpReluAutoEncoder",
    ),
}
"""Classes that can be accelerated, by library. SAELens turns a BatchTopK into a JumpReLU for
inference."""


def supported_base(kind: type) -> type | None:
    """The supported class that a class is, or that it derives from."""
    for base in kind.__mro__:
        if base.__qualname__ in SUPPORTED.get(base.__module__.split(".")[0], ()):
            return base
    return None


@cache
def fast_class(kind: type) -> type | None:
    """The accelerated class of a library's class or a subclass of it; None if unsupported.

    That of a subclass derives from it first, so that its own methods are called.
    """
    kind = original(kind)
    base = supported_base(kind)
    if base is None:
        return None
    library = base.__module__.split(".")[0]
    fast = getattr(import_module(f"fastsae.dropin.{library}"), f"Fast{base.__qualname__}")
    if kind is base:
        return fast
    members = {"accelerated_from": kind, "fast": fast, "__reduce_ex__": reduce_ex}
    return type(f"Fast{kind.__name__}", (kind, fast), members | {"__module__": kind.__module__})


def original(kind: Any) -> Any:
    """The class that an accelerated class was made from, or the class itself if it is none."""
    if kind.__module__.startswith("fastsae.dropin."):
        return kind.__bases__[-1]
    return vars(kind).get("accelerated_from", kind)


def library_class(module: nn.Module) -> Any:
    """The class that its library, or a user, gave a module."""
    return original(type(module))


def reduce_ex(self: Any, protocol: Any) -> Any:
    """Pickles an object whose class is made at run time: by the class that it is made from."""
    _, (_, *state), *rest = super(type(self), self).__reduce_ex__(max(protocol, 2))
    return new, (library_class(self), *state), *rest


def new(kind: type, *arguments: Any) -> Any:
    """An object of the accelerated class of `kind`, to be filled with its state."""
    fast = fast_class(kind)
    assert fast is not None
    return fast.__new__(fast, *arguments)


def supported_classes(library: str) -> list[Any]:
    """A library's classes that can be accelerated; imports it."""
    module = import_module(f"fastsae.dropin.{library}")
    return [original(getattr(module, f"Fast{name}")) for name in SUPPORTED[library]]
