"""Other libraries' SAEs with our ops in them: the same objects, faster.

A module is given a subclass of its own class, in which encode and decode are ours. Nothing else
changes: parameters, state_dict, hooks, device, dtype, what isinstance says, copies and pickles.
"""

from importlib import import_module
from typing import TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)

KNOWN = {
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
"""Classes that can be accelerated, by the library they are from. SAELens has no BatchTopK of its
own outside training: it is a JumpReLU there."""

WRONG_GRADIENTS = ("SparseCoder",)
"""Those whose own gradients are not those of what they compute."""


def accelerate(module: Module, *, exact_compat: bool = False) -> Module:
    """Give a known SAE of another library fastsae's encode and decode, in place.

    module: a SparseCoder of sparsify; a TopK, BatchTopK or JumpReLU SAE of SAELens, for training
    or not; an AutoEncoderTopK, BatchTopKSAE or JumpReluAutoEncoder of dictionary_learning. Returns
    the same object, which computes the same outputs, up to rounding and the order of equals, and
    works with its library's trainer. `restore` undoes it.

    Gradients of parameters and inputs are those of what is computed; the dense activations that a
    training pass returns are no longer on their way. sparsify's own differ: its aux-k and multi-k
    losses give the encoder none, and a latent that was chosen with a pre-activation below 0, and
    so is 0, still gets one. With `exact_compat` these stay as they are in sparsify.

    ValueError for another module, with a list of those that are known, and for exact_compat where
    the library's gradients are right.
    """
    if is_accelerated(module):
        restore(module)
    library, name = type(module).__module__.split(".")[0], type(module).__qualname__
    if name not in KNOWN.get(library, ()):
        known = "; ".join(f"{names} of {key}" for key, names in listed().items())
        raise ValueError(f"accelerate knows {known}; got {library}'s {name}")
    if exact_compat and name not in WRONG_GRADIENTS:
        raise ValueError(
            f"exact_compat has no effect: the gradients of {name} are true as they are"
        )
    module.__class__ = getattr(import_module(f"fastsae.dropin.{library}"), f"Fast{name}")
    if exact_compat:
        vars(module)["exact_compat"] = True
    return module


def restore(module: Module) -> Module:
    """Give a module that was accelerated its library's encode and decode back, in place.

    Returns the same object. ValueError if it was not accelerated.
    """
    if not is_accelerated(module):
        raise ValueError(
            f"restore wants a module that was accelerated, got {type(module).__name__}"
        )
    module.__class__ = type(module).__bases__[-1]
    vars(module).pop("exact_compat", None)
    return module


def listed() -> dict[str, str]:
    """What is known, for people."""
    return {library: ", ".join(names) for library, names in KNOWN.items()}


def is_accelerated(module: nn.Module) -> bool:
    """Whether its class is one of ours, whose last base is the class that it stands in for."""
    return type(module).__module__.startswith(f"{__name__}.")
