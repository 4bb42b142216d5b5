"""Adam's state for an SAE, and the learning-rate schedule."""

import math
from collections.abc import Collection

import torch
from torch import Tensor

from fastsae.nn import SAE
from fastsae_kernels.adam import (
    AdamStep,
    RowGradients,
    Rows,
    Window,
    adam_,
    settle_,
)
from fastsae_kernels.dense_adam import fused_adam_


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
    """Adam (arXiv:1412.6980) on the parameters of an SAE.

    Call `begin_step` once per step, then either `update` for every parameter with its dense
    gradient, or `update` for the biases and `update_rows` for both weights.
    """

    def __init__(
        self,
        sae: SAE,
        *,
        moments: torch.dtype | None = None,
        window: int = 1,
        shadows: Collection[str] = (),
        seed: int = 0,
    ):
        """`moments` is the dtype of the weights' moments, by default the weights' own; `window` the
        steps within which every row is visited; `shadows` names the weights that are also kept
        in bfloat16; `seed` is that of stochastic rounding. See `fastsae_kernels.adam`."""
        self.parameters = {name: p.detach() for name, p in sae.named_parameters()}
        kept = {name: moments if name in ("W_dec", "W_enc") else None for name in self.parameters}
        self.first = {n: torch.zeros_like(p, dtype=kept[n]) for n, p in self.parameters.items()}
        self.second = {n: torch.zeros_like(m) for n, m in self.first.items()}
        self.shadow = {name: self.parameters[name].bfloat16() for name in shadows}
        self.at = AdamStep(0, 0.0, seed=seed)
        self.window: Window | None = None
        if window > 1:
            updated = torch.zeros(sae.d_sae, dtype=torch.int32, device=sae.W_enc.device)
            self.window = Window(updated, sae.W_enc.new_zeros(window))

    def begin_step(self, lr: float) -> None:
        self.at = self.at._replace(step=self.at.step + 1, lr=lr)

    def rows(self, name: str) -> Rows:
        """A weight with its moments and its shadow."""
        return Rows(
            self.parameters[name], self.first[name], self.second[name], self.shadow.get(name)
        )

    def update(self, name: str, gradient: Tensor) -> None:
        """Move a parameter down its dense gradient."""
        fused_adam_(self.parameters[name], gradient, self.first[name], self.second[name], self.at)

    def update_rows(self, gradients: RowGradients) -> None:
        """Move both weights down their sparse gradients, and constrain the decoder's rows."""
        adam_(self.rows("W_dec"), self.rows("W_enc"), gradients, self.at, self.window)

    def settle(self) -> None:
        """Bring rows that wait for their update up to date."""
        if self.window is not None:
            settle_(self.rows("W_dec"), self.rows("W_enc"), self.at, self.window)

    def restored(self, step: int) -> None:
        """Go on after a step whose parameters and state_dict have been copied in."""
        self.at = self.at._replace(step=step)
        for name, shadow in self.shadow.items():
            shadow.copy_(self.parameters[name])

    def state_dict(self) -> dict[str, Tensor]:
        moments = {"first": self.first, "second": self.second}
        named = {f"{m}.{name}": t for m, group in moments.items() for name, t in group.items()}
        return named | (self.window._asdict() if self.window is not None else {})
