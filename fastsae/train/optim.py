"""Adam on blocks of rows, the learning-rate schedule, and the constraint on decoder rows."""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

BETAS = (0.9, 0.999)
EPS = 6.25e-10


def default_lr(d_sae: int, steps: int) -> float:
    """The field's rule for long runs, 2e-4 / sqrt(d_sae / 16384); more where time is short.

    A run of under 15000 steps ends far from where it could at that rate; its rate is higher by
    the square root of what it lacks, at most 5 times (our choice: at 600 steps on the demo's
    activations, FVU falls by 0.06 from 1 to 5 times, and latents start to die at 10 times).
    """
    short = min(max(math.sqrt(15_000 / steps), 1.0), 5.0)
    return 2e-4 / math.sqrt(d_sae / 2**14) * short


def schedule(step: int, steps: int, warmup: int, decay: float) -> float:
    """The factor on the learning rate at a step counted from 0.

    Rises linearly over `warmup` steps, falls linearly to 0 over the last `decay` of all steps.
    """
    rise = (step + 1) / (warmup + 1)
    fall = (steps - step) / max(decay * steps, 1)
    return min(1.0, rise, fall)


class Adam:
    """Adam (arXiv:1412.6980) whose parameters may be updated a block of rows at a time.

    The same arithmetic as torch.optim.Adam(fused=True). Call `begin_step` once per step, then
    `update` once for every row of every parameter.
    """

    def __init__(self, parameters: Mapping[str, Tensor], betas=BETAS, eps: float = EPS):
        self.parameters = {name: p.detach() for name, p in parameters.items()}
        self.first = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.second = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.betas, self.eps = betas, eps
        self.step = torch.zeros((), device=next(iter(self.parameters.values())).device)
        self.lr = 0.0

    def begin_step(self, lr: float) -> None:
        self.step += 1
        self.lr = lr

    def update(self, name: str, gradient: Tensor, rows: slice = slice(None)) -> None:
        """Move some rows of a parameter down their gradient."""
        tensors = (self.parameters[name], self.first[name], self.second[name])
        parameter, first, second = ([t[rows]] for t in tensors)
        torch._fused_adam_(  # what torch.optim.Adam(fused=True) calls  # pyright: ignore
            parameter,
            [gradient],
            first,
            second,
            [],
            [self.step],
            lr=self.lr,
            beta1=self.betas[0],
            beta2=self.betas[1],
            weight_decay=0.0,
            eps=self.eps,
            amsgrad=False,
            maximize=False,
        )

    def state_dict(self) -> dict[str, Tensor]:
        moments = {"first": self.first, "second": self.second}
        named = {f"{m}.{name}": t for m, group in moments.items() for name, t in group.items()}
        return {"step": self.step, **named}


def remove_parallel_(gradient: Float[Tensor, "F D"], rows: Float[Tensor, "F D"]) -> None:
    """Leave of each row's gradient what is orthogonal to the (unit-norm) row."""
    gradient.addcmul_(rows, (gradient * rows).sum(1, keepdim=True), value=-1)


def normalise_rows_(rows: Float[Tensor, "F D"]) -> None:
    """Bring each row back to norm 1."""
    rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))
