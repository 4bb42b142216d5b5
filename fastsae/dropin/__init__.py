"""Accelerates SAEs of other libraries in place.

A module's class becomes a subclass of its own, with fastsae's encode and decode. Everything else
stays: parameters, state_dict, hooks, device, dtype, isinstance, copies and pickles.
"""

from typing import TypeVar, overload

from torch import nn

from .classes import SUPPORTED as SUPPORTED
from .classes import fast_class, library_class
from .dense import COUNTERS
from .patch import Patch, unpatch

Module = TypeVar("Module", bound=nn.Module)


@overload
def accelerate(target: Module, *, exact_compat: bool = False) -> Module: ...
@overload
def accelerate(target: str, *, exact_compat: bool = False) -> Patch: ...
def accelerate(target, *, exact_compat=False):
    """Replace encode and decode of another library's SAEs with fastsae's, in place.

    Args:
        target: an SAE of SAELens, sparsify or dictionary_learning, or a module that contains such,
            as `torch.compile` and `nn.ModuleDict` make; or the name of a library, "sae_lens",
            "sparsify" or "dictionary_learning": all SAEs that are created from now on. Subclasses
            are accelerated, too; methods that they override are called.
        exact_compat: for a SparseCoder: keep sparsify's gradients (see below).

    Returns the same object; for a library, a context manager that ends with its block, if it is
    used as one. `restore` undoes the change. Outputs stay the same, up to rounding and the order of
    ties, and SAEs work with their library's trainer. The library's own code still runs where it has
    to: with hooks, or methods or submodules that were replaced; and where it is faster: with many
    active latents, and, except for sparsify, under autocast and for few tokens. NaN exceeds no
    threshold.

    Gradients of parameters and inputs are exact. No gradient flows through the dense activations
    that a training forward pass returns. sparsify's own gradients differ: its aux-k and multi-k
    losses give the encoder none, and a selected latent with a negative pre-activation, whose value
    is 0, still gets one.

    Raises ValueError for an unsupported module or library, listing the supported ones, and for
    exact_compat where it has no effect.
    """
    if isinstance(target, str):
        if exact_compat and target != "sparsify":
            raise ValueError(f"exact_compat has no effect: gradients of {target} are exact anyway")
        return Patch(target, exact_compat)
    found = {module: fast for module in target.modules() if (fast := fast_class(type(module)))}
    if not found:
        raise ValueError(unsupported(library_class(target)))
    exact = [library_class(m).__name__ for m, fast in found.items() if not is_inexact(fast)]
    if exact_compat and exact:
        raise ValueError(f"exact_compat has no effect: gradients of {exact[0]} are exact anyway")
    for module, fast in found.items():
        module.__class__ = fast
        vars(module).pop("exact_compat", None)
        if exact_compat:
            vars(module)["exact_compat"] = True
    return target


def is_inexact(fast: type) -> bool:
    """Whether the gradients of its library's class are not those of what it computes."""
    return hasattr(fast, "exact_compat")


def unsupported(kind: type) -> str:
    """What the message says of a class that is not supported."""
    known = "; ".join(f"{', '.join(names)} of {key}" for key, names in SUPPORTED.items())
    return (
        f"accelerate() supports {known}; their subclasses, and modules that contain them; got "
        f"{kind.__module__.split('.')[0]}'s {kind.__qualname__}. For a model of your own, use "
        "fastsae.nn.TopKLinear and fastsae.nn.CodesLinear"
    )


@overload
def restore(target: Module) -> Module: ...
@overload
def restore(target: str) -> None: ...
def restore(target):
    """Undo `accelerate` in place and return the module.

    For the name of a library, SAEs that are created from now on are its own again; those that were
    accelerated stay so. ValueError if nothing was accelerated.
    """
    if isinstance(target, str):
        return unpatch(target)
    found = {module: library_class(module) for module in target.modules()}
    found = {module: kind for module, kind in found.items() if kind is not type(module)}
    if not found:
        raise ValueError(
            f"restore() expects a module returned by accelerate(), got {type(target).__name__}"
        )
    for module, kind in found.items():
        module.__class__ = kind
        for name in ("exact_compat", *COUNTERS):
            vars(module).pop(name, None)
    return target
