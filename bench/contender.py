"""A contender is a trainer with its settings, one row of a table; `step_of` builds its step."""

from collections.abc import Callable
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from fastsae import SAE, TopK
from fastsae.device import tf32_products
from fastsae.losses import Objective
from fastsae.nn import TopKConfig
from fastsae.train import TrainConfig
from fastsae.train.graph import CapturedStep
from fastsae.train.optim import Adam
from fastsae.train.plan import copies_of, encoder_precision
from fastsae.train.step import fused_step
from fastsae_kernels import _launch
from fastsae_kernels.int8 import why_not_int8

from .dense import DenseTopK, dense_adam, dense_step
from .ops import decode_torch
from .problem import Problem

LR = 1e-5

GPU = torch.cuda.is_available()
LOW = ["bf16"] * GPU + ["int8"] * (not GPU and why_not_int8("cpu") is None)
"""Encoder precisions below fp32 that this machine supports; on a CPU, bf16 is the same as fp32."""


class Contender(NamedTuple):
    """A trainer with its settings."""

    trainer: str = "fastsae"
    """fastsae, dense (dense.py), or a library with a file train_LIBRARY.py in peers/."""
    options: dict[str, Any] = {}
    """Options of TrainConfig, or of the library's trainer."""
    dead: bool = False
    """Whether 5 % of the latents are dead, so that the aux-k loss applies."""
    buffer_mb: int | None = None
    """Size of the pre-activation buffer; None for the default."""
    package: str | None = None
    """Name on PyPI of the library that must be installed, if any."""
    adam: bool = True
    """Whether it trains with Adam, so that fastsae's learning rate can be used."""


@torch.no_grad()
def random_sae(p: Problem) -> SAE:
    """An SAE with tied unit-norm rows, allocated directly on the device."""
    with torch.device("meta"):
        sae = SAE(p.D, p.F, TopK(p.K))
    sae = sae.to_empty(device=p.device)
    sae.W_dec.normal_()
    sae.W_dec.div_(torch.linalg.vector_norm(sae.W_dec, dim=1, keepdim=True))
    sae.W_enc.copy_(sae.W_dec)
    sae.b_enc.zero_()
    sae.b_dec.zero_()
    return sae


@torch.no_grad()
def batches(p: Problem, W_dec: Tensor) -> list[tuple[Tensor]]:
    """Two batches of noisy sums of dictionary rows, so that some latents fire often.

    Computed by PyTorch: a kernel of ours that fails must not affect the other contenders.
    """
    rows = (decode_torch(*p.codes(torch.float32), W_dec) for _ in range(2))
    return [(x.add_(torch.randn_like(x), alpha=0.02),) for x in rows]


Step = Callable[[Tensor], object]


def step_of(contender: Contender, p: Problem, sae: SAE) -> Step:
    """A full training step, including the count of tokens since each latent fired.

    Raises ValueError or TypeError for options that this version or machine does not support.
    """
    update = (fused_update if contender.trainer == "fastsae" else dense_update)(contender, p, sae)
    unfired = torch.zeros(p.F, dtype=torch.int64, device=p.device)
    return lambda x: unfired.add_(len(x)).masked_fill_(update(x), 0)


Update = Callable[[Tensor], Tensor]
"""Updates the weights and returns a mask of the latents that fired."""


def fused_update(contender: Contender, p: Problem, sae: SAE) -> Update:
    """The fused step, set up as in the Trainer.

    A CUDA graph is captured only if it is "on": a capture that fails would spoil other rows.
    """
    config = TrainConfig(d_sae=p.F, activation=TopKConfig(k=p.K), **contender.options)
    device = "cuda" if p.dry or p.device.type == "meta" else p.device.type
    precision = "bf16" if config.encoder_precision == "auto" else config.encoder_precision
    if p.device.type == device:
        precision = encoder_precision(config, "fused", device, p.D, p.F)
    adam = Adam(sae, config.optimizer, **copies_of(precision))
    graph = config.cuda_graph == "on"
    if graph and p.device.type != "cuda":
        raise ValueError("a CUDA graph needs a GPU")
    captured = CapturedStep(sae, adam, Objective(), required=True) if graph else None
    dead = torch.arange(0, p.F, 20, device=p.device) if contender.dead else None

    def update(x: Tensor) -> Tensor:
        adam.begin_step(LR)
        room = patch.object(_launch, "_BUFFER_MB", contender.buffer_mb or _launch._BUFFER_MB)
        with room, tf32_products(precision == "tf32"):
            result = captured(x) if captured else fused_step(sae, adam, x, dead, Objective())
        assert result.fired is not None, "only evaluation leaves it out"
        return result.fired

    return update


def dense_update(contender: Contender, p: Problem, sae: SAE) -> Update:
    """Dense PyTorch's step, on a GPU with matmuls in bfloat16."""
    model = DenseTopK(sae)
    adam = dense_adam(model, LR)
    dead = torch.arange(p.F, device=p.device) % 20 == 0 if contender.dead else None
    low = p.dry or p.device.type == "cuda"
    return lambda x: dense_step(model, adam, x, dead, p.D // 2, low=low)[1]
