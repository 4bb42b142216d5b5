"""How a differentiable op is registered, so that eager mode and torch.compile call the same one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad


def register(function: type[Function], fake: Callable[..., Any]) -> Callable[..., Any]:
    """The library op fastsae::stem of an autograd Function named _Stem.

    `function` is written in the new style: forward(*inputs) without a context, annotated in terms
    that torch.library understands; setup_context; backward as a formula of other ops. `fake` takes
    forward's arguments and returns empty tensors of the shapes and dtypes that forward returns.
    A call costs no more than the Function's own `apply` (30 microseconds with torch 2.13).
    NotImplementedError for a call in forward mode, of which library ops would drop the tangents.
    """
    stem = "".join("_" + c.lower() if c.isupper() else c for c in function.__name__[1:])[1:]
    op = torch.library.custom_op(f"fastsae::{stem}", function.forward, mutates_args=())
    op.register_fake(fake)
    op.register_autograd(function.backward, setup_context=function.setup_context)

    def call(*arguments: Any) -> Any:
        if any(map(has_tangent, arguments)):
            raise NotImplementedError(f"fastsae::{stem} has no derivative in forward mode")
        return op(*arguments)

    return call


def has_tangent(argument: Any) -> bool:
    """Whether forward-mode differentiation goes through an argument."""
    return isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None


def register_constant(function: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """The library op fastsae::stem of a function _stem whose results have no gradient."""
    op = torch.library.custom_op(f"fastsae::{function.__name__[1:]}", function, mutates_args=())
    op.register_fake(fake)
    return op
