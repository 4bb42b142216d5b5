"""Accelerates SAEs of other libraries in place.

A module's class becomes a subclass of its own, with fastsae's encode and decode. Everything else
stays: parameters, state_dict, hooks, device, dtype, isinstance, copies and pickles.
"""

from importlib import import_module
from typing import Any, TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)

SUPPORTED = {
    "sparsify": ("SparseCoder",),
    "sae_lens": (
        "TopKSAE",
        "TopKTrainingSAE",
        "BatchTopKTrainingSAE",
        "JumpReLUSAE",
        "JumpReLUTrainingSAE",
    ),
    "dictionary_learning": ("AutoEncoderTopK", "BatchTopKSAE", "JumpReluAutoEncoder"),
}
"""Classes that can be accelerated, by library. SAELens turns a BatchTopK into a JumpReLU for
inference."""

INEXACT_GRADIENTS = ("SparseCoder",)
"""Classes whose gradients in their own library are not those of what they compute."""


def accelerate(module: Module, *, exact_compat: bool = False) -> Module:
    """Replace encode and decode of another library's SAE with fastsae's, in place.

    Args:
        module: a SparseCoder of sparsify; a TopK, BatchTopK or JumpReLU SAE of SAELens, for
            training or inference; or an AutoEncoderTopK, BatchTopKSAE or JumpReluAutoEncoder of
            dictionary_learning.
        exact_compat: for a SparseCoder: keep sparsify's gradients (see below).

    Returns the same object. Its outputs stay the same, up to rounding and the order of ties, and it
    works with its library's trainer; `restore` undoes the change. The library's own code still runs
    where it has to: with hooks, or methods or submodules that were replaced. Except for sparsify it
    also runs under autocast and for few tokens, where it is faster. NaN exceeds no threshold.

    Gradients of parameters and inputs are exact. No gradient flows through the dense activations
    that a training forward pass returns. sparsify's own gradients differ: its aux-k and multi-k
    losses give the encoder none, and a selected latent with a negative pre-activation, whose value
    is 0, still gets one.

    Raises ValueError for an unsupported module, listing the supported ones, and for exact_compat
    where it has no effect.
    """
    kind = library_class(module)
    library, name = kind.__module__.split(".")[0], kind.__qualname__
    if name not in SUPPORTED.get(library, ()):
        known = "; ".join(f"{', '.join(names)} of {key}" for key, names in SUPPORTED.items())
        raise ValueError(f"accelerate() supports {known}; got {library}'s {name}")
    activation = getattr(getattr(module, "cfg", None), "activation", "topk")
    if activation != "topk":
        raise ValueError(f"accelerate() supports a {name} with topk, got one with {activation}")
    if exact_compat and name not in INEXACT_GRADIENTS:
        raise ValueError(f"exact_compat has no effect: the gradients of {name} are exact anyway")
    module.__class__ = getattr(import_module(f"fastsae.dropin.{library}"), f"Fast{name}")
    vars(module).pop("exact_compat", None)
    if exact_compat:
        vars(module)["exact_compat"] = True
    return module


def restore(module: Module) -> Module:
    """Undo `accelerate` in place and return the object; ValueError if it was not accelerated."""
    kind = library_class(module)
    if kind is type(module):
        raise ValueError(
            f"restore() expects a module returned by accelerate(), got {kind.__name__}"
        )
    module.__class__ = kind
    vars(module).pop("exact_compat", None)
    return module


def library_class(module: nn.Module) -> Any:
    """The class that its library gave it: the last base of a class from this package."""
    kind = type(module)
    return kind.__bases__[-1] if kind.__module__.startswith(f"{__name__}.") else kind
