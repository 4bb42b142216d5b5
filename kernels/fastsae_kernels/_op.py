"""Registers ops with torch, for eager mode, torch.func and torch.compile.

torch.compile, dispatch modes, fake and meta tensors and profilers need a torch.library op. But its
overhead in eager mode is three times that of an autograd Function (60 and 20 microseconds per call
with torch 2.13), and torch.func cannot differentiate it. So each op also exists as a Function with
the same forward and backward, which eager mode and torch.func call.
"""

from collections.abc import Callable
from functools import wraps
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.nn import Parameter

EAGER_TYPES = frozenset(
    {Tensor, Parameter, NoneType, bool, int, float, str, tuple, list, torch.dtype, torch.Size}
)
"""Argument types of the eager path; others, such as tensor subclasses, use the library op."""


def register(function: type[Function], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register an autograd Function named _Stem as the op fastsae::stem, and return a callable.

    `function` has forward(*inputs) without a context, annotated with types that torch.library
    knows; setup_context; and backward in terms of other ops. `fake` takes forward's arguments, a
    tensor first, and returns empty tensors of the shapes and dtypes that forward returns. `fake`
    and `backward` see symbolic sizes: use x.shape[0], since len(x) would specialize the size.
    torch.vmap calls the op once per batch element. Raises NotImplementedError in forward mode, and
    for torch.func inside torch.compile.
    """
    stem = "".join("_" + c.lower() if c.isupper() else c for c in function.__name__[1:])[1:]
    op = torch.library.custom_op(f"fastsae::{stem}", function.forward, mutates_args=())
    op.register_fake(fake)
    op.register_autograd(function.backward, setup_context=function.setup_context)
    return dispatcher(function, op, f"fastsae::{stem}")


def register_constant(function: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register a function without a gradient, such as a backward pass, as the op fastsae::name.

    Differentiating its results raises a RuntimeError.
    """
    name = f"fastsae::{function.__name__.removeprefix('_')}"
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

    return wraps(function)(dispatcher(Constant, op, name))


def dispatcher(function: type[Function], op: Any, name: str) -> Callable[..., Any]:
    """A callable that calls the Function or the library op, depending on the context."""

    class Eager(Function):
        """For eager mode: runs the op's own forward, without the library's overhead."""

        @staticmethod
        def forward(ctx, *arguments):
            output = function.forward(*arguments)
            function.setup_context(ctx, arguments, output)
            return output

        backward = function.backward

    class Transformed(Function):
        """For torch.func, which needs forward without a context, jvp and vmap."""

        setup_context, backward = function.setup_context, function.backward

        @staticmethod
        def forward(*arguments):
            return op(*arguments)

        @staticmethod
        def jvp(ctx, *tangents):
            raise NotImplementedError(f"{name} has no derivative in forward mode")

        @staticmethod
        def vmap(info, in_dims, *arguments):
            return vmap_in_a_loop(call, name, info.batch_size, in_dims, arguments)

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
        if watched or arguments[0].is_meta or not EAGER_TYPES.issuperset(map(type, arguments)):
            return op(*arguments)
        return (Eager.apply if torch.is_grad_enabled() else function.forward)(*arguments)

    for kind in (Eager, Transformed):
        kind.__name__ = name.removeprefix("fastsae::")  # in error messages and profiles
    return call


def has_tangent(argument: Any) -> bool:
    """Whether forward-mode differentiation is active for an argument."""
    return isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None


def vmap_in_a_loop(
    call: Callable[..., Any], name: str, size: int, in_dims: tuple, arguments: tuple
) -> tuple[Any, Any]:
    """The vmap rule: call the op once per batch element and stack the results in dimension 0."""
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
