"""How an op is registered, so that eager mode, torch.func and torch.compile call the same one.

The library op is for those who look at calls from outside: torch.compile, dispatch modes, fake and
meta tensors, profilers. In eager mode it would cost three times what an autograd Function does (60
and 20 microseconds a call with torch 2.13), and torch.func cannot differentiate it; so eager mode
calls a Function of the same forward and backward, and torch.func one that it understands.
"""

from collections.abc import Callable
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.nn import Parameter

PLAIN = frozenset(
    {Tensor, Parameter, NoneType, bool, int, float, str, tuple, list, torch.dtype, torch.Size}
)
"""Types of arguments that are what they seem; others go to the library op."""


def register(function: type[Function], fake: Callable[..., Any]) -> Callable[..., Any]:
    """The library op fastsae::stem of an autograd Function named _Stem.

    `function` is written in the new style: forward(*inputs) without a context, annotated in terms
    that torch.library understands; setup_context; backward as a formula of other ops. `fake` takes
    forward's arguments, a tensor first, and returns empty tensors of the shapes and dtypes that
    forward returns. `fake` and `backward` see symbolic sizes: x.shape[0], of which len(x) makes a
    number.
    torch.vmap calls the op once for each of its batch. NotImplementedError in forward mode, and
    for torch.func inside torch.compile.
    """
    stem = "".join("_" + c.lower() if c.isupper() else c for c in function.__name__[1:])[1:]
    op = torch.library.custom_op(f"fastsae::{stem}", function.forward, mutates_args=())
    op.register_fake(fake)
    op.register_autograd(function.backward, setup_context=function.setup_context)
    return caller(function, op, f"fastsae::{stem}")


def register_constant(function: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """The library op fastsae::stem of a function _stem whose results have no gradient: to ask for
    one is a RuntimeError."""
    name = f"fastsae::{function.__name__[1:]}"
    op = torch.library.custom_op(name, function, mutates_args=())
    op.register_fake(fake)

    class Constant(Function):
        forward = staticmethod(function)

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, *gradients):
            raise RuntimeError(f"{name} has no derivative: its op can be differentiated once")

    return caller(Constant, op, name)


def caller(function: type[Function], op: Any, name: str) -> Callable[..., Any]:
    """What calls forward of `function`, the library op or not, as the call's surroundings ask."""

    class Eager(Function):
        @staticmethod
        def forward(ctx, *arguments):
            output = function.forward(*arguments)
            function.setup_context(ctx, arguments, output)
            return output

        backward = function.backward

    class Transformed(Function):
        setup_context, backward = function.setup_context, function.backward

        @staticmethod
        def forward(*arguments):
            return op(*arguments)

        @staticmethod
        def jvp(ctx, *tangents):
            raise NotImplementedError(f"{name} has no derivative in forward mode")

        @staticmethod
        def vmap(info, in_dims, *arguments):
            return one_by_one(call, name, info.batch_size, in_dims, arguments)

    def call(*arguments: Any) -> Any:
        transformed = torch._C._are_functorch_transforms_active()
        if forward_ad._current_level >= 0 and any(map(has_tangent, arguments)):
            raise NotImplementedError(f"{name} has no derivative in forward mode")
        if torch.compiler.is_compiling():
            if transformed:
                raise NotImplementedError(f"{name} cannot be in torch.func inside torch.compile")
            return op(*arguments)
        if transformed:
            return Transformed.apply(*arguments)
        profiled = torch.autograd._profiler_enabled()  # pyright: ignore[reportPrivateImportUsage]
        watched = profiled or torch._C._len_torch_dispatch_stack()
        if watched or arguments[0].is_meta or not PLAIN.issuperset(map(type, arguments)):
            return op(*arguments)
        return (Eager.apply if torch.is_grad_enabled() else function.forward)(*arguments)

    for kind in (Eager, Transformed):
        kind.__name__ = name.removeprefix("fastsae::")  # in error messages and profiles
    return call


def has_tangent(argument: Any) -> bool:
    """Whether forward-mode differentiation goes through an argument."""
    return isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None


def one_by_one(
    call: Callable[..., Any], name: str, size: int, in_dims: tuple, arguments: tuple
) -> tuple[Any, Any]:
    """What torch.vmap asks for: the results for each of a batch's arguments, stacked, and where."""
    pairs = list(zip(arguments, in_dims, strict=True))
    outputs = [
        call(*(a.select(d, i) if isinstance(d, int) else a for a, d in pairs)) for i in range(size)
    ]
    several = isinstance(outputs[0], tuple)
    columns = list(zip(*outputs, strict=True)) if several else [outputs]
    if any(part.shape != column[0].shape for column in columns for part in column):
        raise RuntimeError(f"torch.vmap of {name}: its results differ in size over the batch")
    stacked = tuple(torch.stack(column) for column in columns)
    return (stacked, (0,) * len(stacked)) if several else (stacked[0], 0)
