"""One encoder GEMM for several SAEs of the same shape, unless each is faster in bfloat16.

Their encoders are slices of one matrix, and h = x W_enc^T + (b_enc - W_enc b_dec), so that all take
the same x. For TopK in the fused step, whose codes need no gradient, in fp32 or tf32.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fastsae.codes import Codes
from fastsae.device import tf32_products
from fastsae.nn import TopK
from fastsae_kernels import encode_topk_each

from .state import TrainState
from .trainer import Trainer


class Stack(NamedTuple):
    """SAEs of one shape by name, and the matrix of their encoders."""

    states: dict[str, TrainState]
    W_enc: Float[Tensor, "S_d_sae d_in"]
    tf32: bool

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "N d_in"]) -> dict[str, Codes]:
        """The codes of a batch in each SAE, as `TopK.encode` returns them."""
        saes = [state.sae for state in self.states.values()]
        shards, own = saes[0].shards, len(saes[0].W_enc)
        x = shards.own_tokens(saes[0].tokens(x))
        bias = torch.cat([torch.addmv(s.b_enc, s.W_enc, s.b_dec, alpha=-1) for s in saes])
        choices = [(s.activation.cfg.k, s.activation.cfg.by) for s in saes]
        with tf32_products(self.tf32):
            found = encode_topk_each(x, self.W_enc, bias, [(min(k, own), by) for k, by in choices])
        return {
            name: shards.keep_best(Codes(*codes, own), *choice)
            for name, codes, choice in zip(self.states, found, choices, strict=True)
        }


def stacks(trainers: dict[str, Trainer], states: dict[str, TrainState]) -> list[Stack]:
    """Groups of SAEs that share an encoder GEMM, their encoders moved into one matrix."""
    groups: dict[tuple[int, bool, str], dict[str, TrainState]] = {}
    for name, trainer in trainers.items():
        state = states[name]
        low = state.adam.shadow or state.adam.quantized
        fused = trainer.plan.step == "fused" and not low
        if fused and isinstance(state.sae.activation, TopK):
            kind = state.sae.d_sae, state.sae.layer_norm, trainer.plan.encoder_precision
            groups.setdefault(kind, {})[name] = state
    return [stacked(g, precision) for (*_, precision), g in groups.items() if len(g) > 1]


def stacked(states: dict[str, TrainState], precision: str) -> Stack:
    """Move the encoders of these SAEs into one matrix, in which Adam then updates them."""
    W_enc = torch.cat([state.sae.W_enc.detach() for state in states.values()])
    for state, rows in zip(states.values(), W_enc.chunk(len(states)), strict=True):
        state.adam.move("W_enc", rows)
        state.sae.W_enc.data = rows
    return Stack(states, W_enc, precision == "tf32")
