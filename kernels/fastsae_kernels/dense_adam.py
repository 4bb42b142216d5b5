"""Adam with a dense gradient, and the constraint to rows of norm 1: the parts of adam.py.

Shapes: F latents, D width.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class AdamStep(NamedTuple):
    """The settings of one step, counted from 1; seed is that of stochastic rounding."""

    step: int
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 6.25e-10
    seed: int = 0
    scalars: Tensor | None = None
    """What changes from step to step, on a GPU: see `scalars_of`. A captured step reads them."""


# --- reference: the specification -----------------------------------------------------------


def adam_reference(
    W: Tensor, m: Tensor, v: Tensor, g: Tensor, at: AdamStep, unit: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One row or all of them, with a dense gradient: [F, D] -> W, m, v"""
    (b1, b2), t = at.betas, at.step
    if unit:
        g = g - (g * W).sum(-1, keepdim=True) * W
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g * g
    W = W - at.lr * m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + at.eps)
    return W / W.norm(dim=-1, keepdim=True) if unit else W, m, v


# --- torch: what runs on every device -------------------------------------------------------


def remove_parallel_(gradient: Tensor, rows: Tensor) -> None:
    """Leave of each row's gradient, [F, D], what is orthogonal to the (unit-norm) row, [F, D]."""
    gradient.addcmul_(rows, (gradient * rows).sum(1, keepdim=True), value=-1)


def normalize_rows_(rows: Tensor) -> None:
    """Bring each row of [F, D] back to norm 1."""
    rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))


def fused_adam_(weight: Tensor, g: Tensor, first: Tensor, second: Tensor, at: AdamStep) -> None:
    """What torch.optim.Adam(fused=True) does (arXiv:1412.6980), in place; all of one shape."""
    assert g.stride() == weight.stride(), "the operator goes through memory, not through indices"
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


def stochastic_bf16(x: Tensor, generator: torch.Generator) -> Tensor:
    """float32 to bfloat16, up or down with the odds that make the mean exact."""
    size, device = x.shape, x.device
    bits = torch.randint(0, 1 << 16, size, dtype=torch.int32, generator=generator, device=device)
    rounded = ((x.contiguous().view(torch.int32) + bits) & -65536).view(torch.float32)
    return rounded.where(x == x, x).bfloat16()


def seed32(at: AdamStep) -> int:
    """32 bits in which seeds differ."""
    return (at.seed ^ (at.seed >> 32)) * 0x9E3779B1 % 2**32


def window_coefficient(at: AdamStep) -> float:
    """lr sqrt(1 - b2^t) / (1 - b1^t): what a later catch-up needs to know of a step."""
    b1, b2 = (beta**at.step for beta in at.betas)
    return at.lr * math.sqrt(1 - b2) / (1 - b1)


def scalars_of(at: AdamStep) -> Tensor:
    """int32 [7] of a step, on the CPU: step and seed, then the bits of float32s: lr, step,
    lr / (1 - b1^t), sqrt(1 - b2^t), and the window's coefficient."""
    b1, b2 = (beta**at.step for beta in at.betas)
    floats = at.lr, at.step, at.lr / (1 - b1), math.sqrt(1 - b2), window_coefficient(at)
    whole = torch.tensor([at.step, seed32(at) >> 1], dtype=torch.int32)
    return torch.cat((whole, torch.tensor(floats, dtype=torch.float32).view(torch.int32)))


def scalars_on(at: AdamStep, device: torch.device) -> Tensor:
    """The step's scalars on a device, copied unless the step has them there already."""
    return scalars_of(at).to(device, non_blocking=True) if at.scalars is None else at.scalars
