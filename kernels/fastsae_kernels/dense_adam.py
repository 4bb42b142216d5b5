"""The parts of adam.py: Adam with a dense gradient, unit-norm rows, and stochastic rounding.

Shapes: F latents, D width.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class AdamStep(NamedTuple):
    """Settings of one step. Steps count from 1; `seed` is for stochastic rounding."""

    step: int
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 6.25e-10
    seed: int = 0
    """Of stochastic rounding, which depends on it, the step and the row alone (on a CPU with a
    window, also on which rows are due)."""
    first_row: int = 0
    """The number of the first row, where other processes have those before it."""
    scalars: Tensor | None = None
    """The values that change from step to step, on a GPU, where a CUDA graph reads them; see
    `scalars_of`."""


# --- reference: the specification -----------------------------------------------------------


def adam_reference(
    W: Tensor, m: Tensor, v: Tensor, g: Tensor, at: AdamStep, unit: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Any number of rows, with a dense gradient: [F, D], v also [F, 1] -> W, m, v"""
    (b1, b2), t = at.betas, at.step
    if unit:
        g = g - (g * W).sum(-1, keepdim=True) * W
    m = b1 * m + (1 - b1) * g
    square = g * g if v.shape == g.shape else (g * g).mean(-1, keepdim=True)
    v = b2 * v + (1 - b2) * square
    W = W - at.lr * m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + at.eps)
    return W / W.norm(dim=-1, keepdim=True) if unit else W, m, v


# --- torch: what runs on every device -------------------------------------------------------


def remove_parallel_(gradient: Tensor, rows: Tensor) -> None:
    """Project each row of a gradient [F, D] orthogonally to the unit-norm row of `rows` [F, D]."""
    gradient.addcmul_(rows, (gradient * rows).sum(1, keepdim=True), value=-1)


def normalize_rows_(rows: Tensor) -> None:
    """Normalize each row of [F, D] to norm 1, in place."""
    rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))


def dense_adam_(weight: Tensor, g: Tensor, first: Tensor, second: Tensor, at: AdamStep) -> None:
    """One step in place: Adam (arXiv:1412.6980), all of one shape, or, with a second moment per row
    [F, 1], the mean of its entries' (arXiv:2406.16793)."""
    if second.shape == weight.shape:
        _fused_adam_(weight, g, first, second, at)
    elif weight.dim() == 2 and second.shape == (len(weight), 1):
        _row_adam_(weight, g, first, second, at)
    else:
        raise ValueError(
            f"the second moment must be of shape {list(weight.shape)} or one number per row, "
            f"got {list(second.shape)}"
        )


def _row_adam_(weight: Tensor, g: Tensor, first: Tensor, second: Tensor, at: AdamStep) -> None:
    b1, b2 = at.betas
    lr, root = at.lr / (1 - b1**at.step), math.sqrt(1 - b2**at.step)
    if at.scalars is not None:
        lr, root = at.scalars.view(torch.float32)[4:6].unbind()
    first.lerp_(g, 1 - b1)
    norm = torch.linalg.vector_norm(g, dim=1, keepdim=True)
    second.mul_(b2).addcmul_(norm, norm, value=(1 - b2) / g.shape[1])
    weight.addcmul_(first, lr * root / (second.sqrt() + at.eps * root), value=-1)


def _fused_adam_(weight: Tensor, g: Tensor, first: Tensor, second: Tensor, at: AdamStep) -> None:
    """torch.optim.Adam(fused=True)."""
    if g.stride() != weight.stride():  # torch's operator walks through memory, not indices
        g = torch.empty_like(weight).copy_(g)
    lr, step = at.lr, None
    if at.scalars is not None:
        lr, step = at.scalars.view(torch.float32)[2:4].unbind()
    torch._fused_adam_(  # pyright: ignore[reportPrivateImportUsage]
        [weight],
        [g],
        [first],
        [second],
        [],
        [torch.full((), float(at.step), device=weight.device) if step is None else step],
        lr=lr,
        beta1=at.betas[0],
        beta2=at.betas[1],
        weight_decay=0.0,
        eps=at.eps,
        amsgrad=False,
        maximize=False,
    )


def stochastic_bf16(x: Tensor, generator: torch.Generator, before: int = 0) -> Tensor:
    """Round float32 to bfloat16, up or down with the probabilities that make the mean exact, and as
    if as many rows as `before` came first."""
    size, device = (before + len(x), *x.shape[1:]), x.device
    bits = torch.randint(0, 1 << 16, size, dtype=torch.int32, generator=generator, device=device)
    rounded = ((x.contiguous().view(torch.int32) + bits[before:]) & -65536).view(torch.float32)
    return rounded.where(x == x, x).bfloat16()


def seed32(at: AdamStep) -> int:
    """The seed hashed to 32 bits."""
    return (at.seed ^ (at.seed >> 32)) * 0x9E3779B1 % 2**32


def window_coefficient(at: AdamStep) -> float:
    """lr sqrt(1 - b2^t) / (1 - b1^t): what rows need to catch up on a missed step."""
    b1, b2 = (beta**at.step for beta in at.betas)
    return at.lr * math.sqrt(1 - b2) / (1 - b1)


def scalars_of(at: AdamStep) -> Tensor:
    """A step's scalars as one int32 tensor [7] on the CPU, which takes a single copy to a GPU.

    They are step and seed plus first_row, then the bits of five float32: lr, step, lr / (1 - b1^t),
    sqrt(1 - b2^t), and the window's coefficient.
    """
    b1, b2 = (beta**at.step for beta in at.betas)
    floats = at.lr, at.step, at.lr / (1 - b1), math.sqrt(1 - b2), window_coefficient(at)
    seed = ((seed32(at) >> 1) + at.first_row + 2**31) % 2**32 - 2**31  # wraps as in the kernel
    whole = torch.tensor([at.step, seed], dtype=torch.int32)
    return torch.cat((whole, torch.tensor(floats, dtype=torch.float32).view(torch.int32)))


def scalars_on(at: AdamStep, device: torch.device) -> Tensor:
    """The step's scalars on a device, copied there unless the step already has them."""
    return scalars_of(at).to(device, non_blocking=True) if at.scalars is None else at.scalars
