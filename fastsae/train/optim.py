"""Adam's state for an SAE, what is done to weights and gradients around it, and the schedule."""

import copy
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fastsae.config import check_choices
from fastsae.distributed.parallelize import per_latent
from fastsae.nn import SAE
from fastsae.shards import ONE_PROCESS, Shards
from fastsae_kernels import (
    AdamStep,
    BiasGradients,
    RowGradients,
    Rows,
    Window,
    adam_,
    dense_adam_,
    flush_,
    normalize_rows_,
    quantize_int8,
    quantize_rows,
    remove_parallel_,
    scalars_of,
)

Constraint = Literal["unit", "aligned", "none"]
Moments = Literal["fp32", "bf16"]
Second = Literal["entry", "row"]


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Optimizer."""

    lr: float | None = None
    """Peak learning rate (default: 2e-4 / sqrt(d_sae / 16384), up to 5 times that in runs under
    50000 steps, less with batches under 1024)."""

    warmup: int | None = None
    """Learning-rate warmup steps (default: 5% of the run, at most 1000)."""

    decay: float = 0.2
    """Fraction of the run, at its end, over which the learning rate decays to 0."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Adam betas (beta1, beta2)."""

    eps: float = 6.25e-10
    """Adam epsilon."""

    clip: float | None = None
    """Clip the global gradient norm to this value."""

    ema: float | None = None
    """Decay of the EMA of the weights; if set, the EMA weights are saved."""

    constraint: Constraint = "unit"
    """Constraint after each step. unit: decoder rows of norm 1, with gradients projected orthogonal
    to them. aligned: each encoder row's dot product with its decoder row is 1
    (arXiv:2605.18629)."""

    adam_moments: Moments = "fp32"
    """Precision of Adam's moments of the weights; bf16, rounded stochastically, halves
    them."""

    adam_second: Second = "entry"
    """Adam's second moment of the weights: of each entry, or the mean over each row, which halves
    the memory of the moments (arXiv:2406.16793)."""

    adam_window: int = 1
    """Lazy updates: latents without gradient are updated at least every N steps (max 8), applying
    the missed momentum. 1 is standard Adam."""

    def __post_init__(self):
        check_choices(self, constraint=Constraint, adam_moments=Moments, adam_second=Second)
        for name in ("lr", "eps", "clip"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        if self.warmup is not None and self.warmup < 0:
            raise ValueError(f"warmup must be at least 0, got {self.warmup}")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay must be between 0 and 1, got {self.decay}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be at least 0 and below 1, got {self.betas}")
        if self.adam_window > 1 and not self.betas[1]:
            raise ValueError(f"adam_window above 1 needs a second beta above 0, got {self.betas}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema must be between 0 and 1, got {self.ema}")
        if not 1 <= self.adam_window <= 8:
            raise ValueError(f"adam_window must be between 1 and 8, got {self.adam_window}")
        if self.ema is not None and self.adam_window > 1:
            raise ValueError(f"ema needs adam_window 1, whose rows never wait: {self.adam_window}")


def default_lr(d_sae: int, steps: int, batch_size: int) -> float:
    """The field's rule for long runs, 2e-4 / sqrt(d_sae / 16384); more where time is short, less
    for small batches.

    A run of under 50000 steps ends far from where it could at that rate; its rate is higher by
    the square root of what it lacks, at most 5 times (our choice: on MiniLM's activations, more
    leaves over 2 % of latents dead after 300, 600 and 2000 steps). Below 1024 tokens per batch,
    the rate falls with the square root of the batch size (arXiv:2205.10287; where that begins is
    our choice: on MiniLM's activations, the rate of 1024 tokens leaves 13 % dead with 256).
    """
    short = min(max(math.sqrt(50_000 / steps), 1.0), 5.0)
    return 2e-4 / math.sqrt(d_sae / 2**14) * short * min(math.sqrt(batch_size / 1024), 1.0)


def schedule(step: int, steps: int, warmup: int, decay: float) -> float:
    """The factor on the learning rate at a step counted from 0.

    Rises linearly over `warmup` steps, falls linearly to 0 over the last `decay` of all steps.
    """
    rise = (step + 1) / (warmup + 1)
    fall = (steps - step) / max(decay * steps, 1)
    return min(1.0, rise, fall)


class Adam:
    """Adam (arXiv:1412.6980) on the parameters of an SAE.

    Call `begin_step` once per step, then either `update_all` with dense gradients, or `update`
    for the biases and `update_rows` for both weights; `end_step` after that.
    """

    def __init__(
        self,
        sae: SAE,
        settings: Optimizer | None = None,
        *,
        shadows: Collection[str] = (),
        quantized: Literal["fp8", "int8"] | None = None,
        columns: Float[Tensor, " d_in"] | None = None,
        seed: int = 0,
    ):
        """`shadows` names the weights that are kept in bfloat16 as well, `quantized` says how the
        encoder is kept in 8 bits, int8 with its columns times `columns`; `seed` is that of
        stochastic rounding. See `fastsae_kernels.adam`."""
        self.settings = settings = settings or Optimizer()
        self.shards, self.divided = sae.shards, per_latent(sae)
        low = torch.bfloat16 if settings.adam_moments == "bf16" else None
        self.parameters = {name: p.detach() for name, p in sae.named_parameters()}
        kept = {name: low if name in ("W_dec", "W_enc") else None for name in self.parameters}
        self.first = {n: torch.zeros_like(p, dtype=kept[n]) for n, p in self.parameters.items()}
        self.second = {n: torch.zeros_like(m) for n, m in self.first.items()}
        if settings.adam_second == "row":
            rows = {n: self.parameters[n].new_zeros(len(sae.W_dec), 1) for n in ("W_dec", "W_enc")}
            self.second |= rows
        self.shadow = {name: self.parameters[name].bfloat16() for name in shadows}
        self.quantized = None
        if quantized is not None:
            W = self.parameters["W_enc"]
            self.quantized = quantize_rows(W) if quantized == "fp8" else quantize_int8(W, columns)
        averaged = self.parameters if settings.ema else {}
        self.average = {name: torch.zeros_like(p) for name, p in averaged.items()}
        scalars = None
        if sae.W_enc.is_cuda:  # where they are, no launch changes from step to step
            scalars = scalars_of(AdamStep(1, 0.0)).to(sae.W_enc.device)
        first_row = sae.shards.rows(sae.d_sae).start
        self.at = AdamStep(0, 0.0, settings.betas, settings.eps, seed, first_row, scalars)
        self.window: Window | None = None
        if settings.adam_window > 1:
            updated = torch.zeros(len(sae.W_enc), dtype=torch.int32, device=sae.W_enc.device)
            self.window = Window(updated, sae.W_enc.new_zeros(settings.adam_window))

    def begin_step(self, lr: float) -> None:
        self.at = self.at._replace(step=self.at.step + 1, lr=lr)
        if self.at.scalars is not None:
            self.at.scalars.copy_(scalars_of(self.at), non_blocking=True)

    def move(self, name: str, home: Tensor) -> None:
        """Keep a parameter in other memory, of the same values, from now on."""
        self.parameters[name] = home

    def rows(self, name: str) -> Rows:
        """A weight with its moments and its copies."""
        state = self.parameters[name], self.first[name], self.second[name], self.shadow.get(name)
        return Rows(*state, self.quantized if name == "W_enc" else None)

    def update(self, name: str, gradient: Tensor) -> None:
        """Move a parameter down its dense gradient."""
        dense_adam_(self.parameters[name], gradient, self.first[name], self.second[name], self.at)

    def update_all(self, gradients: dict[str, Tensor]) -> None:
        """Move every parameter down its dense gradient, which is used up, and constrain it."""
        if self.settings.constraint == "unit":
            remove_parallel_(gradients["W_dec"], self.parameters["W_dec"])
        if self.settings.clip:
            clip_(gradients, self.settings.clip, self.shards, self.divided)
        for name, gradient in gradients.items():
            self.update(name, gradient)
        self.constrain()

    def constrain(self) -> None:
        """Bring both weights back to where the constraint wants them."""
        if self.settings.constraint == "unit":
            normalize_rows_(self.parameters["W_dec"])
        elif self.settings.constraint == "aligned":
            align_rows_(self.parameters["W_enc"], self.parameters["W_dec"])

    def update_rows(self, gradients: RowGradients) -> BiasGradients:
        """Move both weights down their sparse gradients, and constrain the decoder's rows."""
        return adam_(self.rows("W_dec"), self.rows("W_enc"), gradients, self.at, self.window)

    def end_step(self) -> None:
        """Take the step into the average."""
        for name, average in self.average.items():
            average.lerp_(self.parameters[name], 1 - (self.settings.ema or 0))

    def flush(self) -> None:
        """Bring rows that wait for their update up to date, and weights to their average."""
        if self.window is not None:
            flush_(self.rows("W_dec"), self.rows("W_enc"), self.at, self.window)
        for name, average in self.average.items():
            self.parameters[name].copy_(average).div_(1 - (self.settings.ema or 0) ** self.at.step)
        if self.average:
            self.constrain()

    def free(self) -> None:
        """Let go of all but the parameters, once there are no more steps."""
        self.first, self.second, self.average, self.shadow = {}, {}, {}, {}
        self.quantized = self.window = None

    def flush_copy(self, sae: SAE) -> None:
        """What `flush` would do to the SAE being trained, done to a copy of it alone."""
        other = copy.copy(self)
        other.parameters = {name: p.detach() for name, p in sae.named_parameters()}
        other.shadow, other.quantized = {}, None
        if self.window is not None:
            moments = self.first, self.second
            other.first, other.second = ({n: m.clone() for n, m in g.items()} for g in moments)
            other.window = Window(*(tensor.clone() for tensor in self.window))
        other.flush()

    def restored(self, step: int) -> None:
        """Go on after a step whose parameters and state_dict have been copied in."""
        self.at = self.at._replace(step=step)
        for name in ("W_dec", "W_enc"):
            self.rows(name).refresh(slice(None), self.parameters[name])

    def state_dict(self) -> dict[str, Tensor]:
        kept = {"first": self.first, "second": self.second, "average": self.average}
        named = {f"{m}.{name}": t for m, group in kept.items() for name, t in group.items()}
        return named | (self.window._asdict() if self.window is not None else {})


def clip_(
    gradients: dict[str, Tensor],
    norm: float,
    shards: Shards = ONE_PROCESS,
    divided: Collection[str] = (),
) -> None:
    """Scale all gradients down so that together they have at most this norm, without a wait.

    The same factor as torch.nn.utils.clip_grad_norm_, which other trainers use. `divided` names
    those of which each process has some rows.
    """
    norms = {name: torch.linalg.vector_norm(g) for name, g in gradients.items()}
    if shards.latent > 1:
        squares = shards.total(torch.stack([norms[name] for name in divided]).square())
        norms |= dict(zip(divided, squares.sqrt(), strict=True))
    total = torch.stack([*norms.values()]).norm()
    factor = (norm / (total + 1e-6)).clamp_max(1.0)
    for gradient in gradients.values():
        gradient.mul_(factor)


def align_rows_(W_enc: Float[Tensor, "F D"], W_dec: Float[Tensor, "F D"]) -> None:
    """Move each encoder row, as little as can be, to a product of 1 with its decoder row.

    The condition is that of arXiv:2605.18629; the projection onto it is our choice.
    """
    missing = 1 - (W_enc * W_dec).sum(1, keepdim=True)
    W_enc.addcmul_(W_dec, missing / W_dec.square().sum(1, keepdim=True))
