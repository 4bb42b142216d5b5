"""Other libraries' SAEs with our ops in them: the same objects, faster.

A module is given a subclass of its own class, in which encode and decode are ours. Nothing else
changes: parameters, state_dict, hooks, device, dtype, what isinstance says, copies and pickles.
"""

from importlib import import_module
from typing import Any, TypeVar

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
    works with its library's trainer. `restore` undoes it. It goes on as its library does where a
    hook, or a method or part of its own that someone replaced, has to be heard; and, but for
    sparsify's, under autocast and for few tokens, for which that is faster. A NaN exceeds no
    threshold.

    Gradients of parameters and inputs are those of what is computed; the dense activations that a
    training pass returns are no longer on their way. sparsify's own differ: its aux-k and multi-k
    losses give the encoder none, and a latent that was chosen with a pre-activation below 0, and
    so is 0, still gets one. With `exact_compat` these stay as they are in sparsify.

    ValueError for another module, with a list of those that are known, and for exact_compat where
    the library's gradients are right.
    """
    kind = own_class(module)
    library, name = kind.__module__.split(".")[0], kind.__qualname__
    if name not in KNOWN.get(library, ()):
        known = "; ".join(f"{', '.join(names)} of {key}" for key, names in KNOWN.items())
        raise ValueError(f"accelerate knows {known}; got {library}'s {name}")
    activation = getattr(getattr(module, "cfg", None), "activation", "topk")
    if activation != "topk":
        raise ValueError(f"accelerate knows a {name} with topk, got one with {activation}")
    if exact_compat and name not in WRONG_GRADIENTS:
        raise ValueError(f"exact_compat has no effect: {name} has true gradients as it is")
    module.__class__ = getattr(import_module(f"fastsae.dropin.{library}"), f"Fast{name}")
    vars(module).pop("exact_compat", None)
    if exact_compat:
        vars(module)["exact_compat"] = True
    return module


def restore(module: Module) -> Module:
    """Give a module that was accelerated its library's encode and decode back, in place.

    Returns the same object. ValueError if it was not accelerated.
    """
    kind = own_class(module)
    if kind is type(module):
        raise ValueError(f"restore wants a module that was accelerated, got {kind.__name__}")
    module.__class__ = kind
    vars(module).pop("exact_compat", None)
    return module


def own_class(module: nn.Module) -> Any:
    """Its library's class: the last base of one of ours, which stands in for it."""
    kind = type(module)
    return kind.__bases__[-1] if kind.__module__.startswith(f"{__name__}.") else kind
