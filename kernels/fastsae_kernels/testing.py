"""The tolerance of all tests: an op may err at most twice as much as its reference."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def assert_no_worse(op: Callable, reference: Callable, *args: Any, factor: float = 2.0) -> None:
    """Raise AssertionError if the error of `op` exceeds `factor` times its reference's own error.

    Both run on the same arguments. An error is the largest distance from the reference in float64.
    This compares all outputs and the gradients of all floating tensors among args, and allows one
    more rounding of the result. Integer outputs must equal the reference's.
    """
    got = _run(op, args)
    reference_got, exact = _run(reference, args), _run(reference, args, torch.float64)
    assert got.keys() == reference_got.keys()
    for name, a in got.items():
        r, e = reference_got[name], exact[name]
        assert (a.shape, a.dtype) == (r.shape, r.dtype), f"{name}: {a.shape} {a.dtype}"
        if not a.is_floating_point():
            assert torch.equal(a, r), f"{name} differs"
        elif a.numel():
            error, own = (a - e).abs().max(), (r - e).abs().max()
            rounding = torch.finfo(a.dtype).eps * e.abs().max()
            assert error <= factor * own + rounding, (
                f"{name}: error {error:.1e} > {factor} * {own:.1e} + {rounding:.1e}"
            )


def _run(fn: Callable, args: tuple, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Outputs of fn and gradients of its arguments, by name, computed in dtype if given."""
    args = tuple(
        a.detach().to(dtype or a.dtype).requires_grad_() if _is_float(a) else a for a in args
    )
    result = fn(*args)
    outs = result if isinstance(result, tuple) else (result,)
    leaves = [a for a in args if _is_float(a)]
    gradients = [torch.zeros_like(leaf) for leaf in leaves]
    through = [out for out in outs if out.requires_grad]
    if through:
        gradients = torch.autograd.grad(
            through, leaves, [_weights(out) for out in through], materialize_grads=True
        )
    named = {f"output {n}": out.detach() for n, out in enumerate(outs)}
    return named | {f"gradient {n}": gradient for n, gradient in enumerate(gradients)}


def _is_float(a: Any) -> bool:
    return isinstance(a, Tensor) and a.is_floating_point()


def _weights(out: Tensor) -> Tensor:
    """The gradient of an output: of both signs, and exact in every dtype."""
    steps = torch.arange(out.numel(), device=out.device) * 5 % 17 - 8
    return (steps / 8).to(out.dtype).view(out.shape)
