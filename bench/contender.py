"""A trainer with its settings, as a row of a table, and the step that it takes."""

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
from fastsae_kernels.product import has_bf16

from .dense import DenseTopK, dense_adam, dense_step
from .ops import decode_torch
from .problem import Problem

LR = 1e-5

GPU = torch.cuda.is_available()
LOW = ["bf16"] * (GPU or has_bf16()) + ["int8"] * (not GPU and why_not_int8("cpu") is None)
"""Precisions of the encoder that this machine has besides fp32."""


class Contender(NamedTuple):
    trainer: str = "fastsae"
    """fastsae, dense (dense.py), or the library that a file of peers/ is named after."""
    options: dict[str, Any] = {}
    """Of TrainConfig, or of the library's trainer."""
    dead: bool = False
    """Whether 5 % of the latents are dead, so that aux-k runs."""
    buffer_mb: int | None = None
    """Room for pre-activations, if not the default."""
    package: str | None = None
    """What must be installed, by its name on PyPI; None for what is here."""
    adam: bool = True
    """Whether a learning rate means what it does in fastsae."""
    accelerated: bool = False
    """Whether its SAE has fastsae's encode and decode in it: then it is timed, but no peer."""


@torch.no_grad()
def empty_sae(p: Problem) -> SAE:
    """Tied unit rows, made on the device without a copy."""
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
    """Two batches of the dictionary's own rows, so that some latents fire often, and noise.

    By PyTorch: no kernel of ours that fails may take the rows of others with it.
    """
    rows = (decode_torch(*p.codes(torch.float32), W_dec) for _ in range(2))
    return [(x.add_(torch.randn_like(x), alpha=0.02),) for x in rows]


Step = Callable[[Tensor], object]


def step_of(contender: Contender, p: Problem, sae: SAE) -> Step:
    """A whole training step, with the count of tokens since each latent fired.

    ValueError or TypeError for options that this code or this machine does not have.
    """
    update = (our_update if contender.trainer == "fastsae" else their_update)(contender, p, sae)
    unfired = torch.zeros(p.F, dtype=torch.int64, device=p.device)
    return lambda x: unfired.add_(len(x)).masked_fill_(update(x), 0)


Update = Callable[[Tensor], Tensor]
"""Updates the weights, and returns which latents fired."""


def our_update(contender: Contender, p: Problem, sae: SAE) -> Update:
    """The fused step, as the Trainer sets it up for these options; a CUDA graph only if it is
    "on", so that no other row is lost with a capture that fails."""
    config = TrainConfig(d_sae=p.F, activation=TopKConfig(k=p.K), **contender.options)
    device = "cuda" if p.dry or p.device.type == "meta" else p.device.type
    precision = "bf16" if config.encoder_precision == "auto" else config.encoder_precision
    if p.device.type == device:
        precision = encoder_precision(config, "fused", device, p.D)
    adam = Adam(sae, config.optimizer, **copies_of(precision, device))
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
        assert result.fired is not None, "a training step says"
        return result.fired

    return update


def their_update(contender: Contender, p: Problem, sae: SAE) -> Update:
    """Dense PyTorch's, with its products in bfloat16 on a GPU."""
    model = DenseTopK(sae)
    adam = dense_adam(model, LR)
    dead = torch.arange(p.F, device=p.device) % 20 == 0 if contender.dead else None
    low = p.dry or p.device.type == "cuda"
    return lambda x: dense_step(model, adam, x, dead, p.D // 2, low=low)[1]
