"""The ops that are timed: what is called on what, the least it must do, and what else does it.

Adding an op takes an entry of OPS. Sizes of elements: 2 bytes in bf16, 4 in fp32, 8 for an index.
"""

from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, linear

from fastsae_kernels import decode, encode_topk, gather_dot, scatter_outer, squared_error, topk
from fastsae_kernels.adam import AdamStep, RowGradients, Rows, Window, adam_
from fastsae_kernels.latent_major import latent_major

from .checks import bf16, fp32
from .checks_encode import FORMS, encoder_dtype, form, tf32
from .clock import Cost
from .data import Problem
from .op import Op, Way, simple
from .ops_activations import ACTIVATIONS


def touched(indices: Tensor, F: int) -> int:
    """Latents that occur in a code."""
    return int(torch.bincount(indices.flatten(), minlength=F).count_nonzero())


# --- encoder --------------------------------------------------------------------------------


def encode_inputs(p: Problem) -> tuple:
    dtype = encoder_dtype(p)
    return p.normal(p.N, p.D, dtype=dtype), p.weights(dtype), p.normal(p.F, dtype=dtype), p.K


def encode_cost(p: Problem, *_: Any) -> Cost:
    return Cost(2 * (p.N + p.F) * p.D + 10 * p.N * p.K, 2 * p.N * p.F * p.D, "bf16")


@contextmanager
def encoding(name: str):
    with ExitStack() as stack:
        stack.enter_context(form(name))
        stack.enter_context(tf32())
        yield


GEMM = "bare GEMM"
PLAIN = {
    GEMM: Way(lambda x, W, b, k: torch.mm(x, W.t())),
    "linear, torch.topk": Way(lambda x, W, b, k: linear(x, W, b).topk(k)),
}


def pre_activations(p: Problem) -> tuple:
    return p.normal(p.chunk(), p.F, dtype=bf16), p.K


def topk_cost(p: Problem, pre: Tensor, k: int) -> Cost:
    return Cost(pre.nbytes + 10 * len(pre) * k)


# --- sparse products ------------------------------------------------------------------------


def decode_inputs(p: Problem) -> tuple:
    return *p.codes(), p.weights()


def decode_cost(p: Problem, values: Tensor, indices: Tensor, W: Tensor) -> Cost:
    rows = touched(indices, p.F) + p.N
    entries = p.N * p.K
    return Cost(2 * rows * p.D + 10 * entries, 2 * entries * p.D, gathered=2 * entries * p.D)


def gather_inputs(p: Problem) -> tuple:
    return p.normal(p.N, p.D, dtype=bf16), p.indices(), p.weights()


def gather_cost(p: Problem, x: Tensor, indices: Tensor, W: Tensor) -> Cost:
    return decode_cost(p, x, indices, W)


def error_inputs(p: Problem) -> tuple:
    """As the step calls it: bf16 codes and rows, fp32 data."""
    return *p.codes(), p.weights(), p.normal(p.D), p.normal(p.N, p.D)


def error_cost(p: Problem, values: Tensor, indices: Tensor, W: Tensor, *_: Any) -> Cost:
    entries = p.N * p.K
    moved = 2 * touched(indices, p.F) * p.D + 6 * p.N * p.D + 14 * entries
    return Cost(moved, 4 * entries * p.D, gathered=2 * entries * p.D)


def error_in_parts(values: Tensor, indices: Tensor, W: Tensor, b: Tensor, target: Tensor) -> tuple:
    error = decode(values, indices, W).add(b).sub_(target)
    return error.square().sum(1), error.bfloat16(), gather_dot(error, indices, W)


def scatter_inputs(p: Problem) -> tuple:
    return *p.codes(), p.normal(p.N, p.D, dtype=bf16), p.F


def scatter_cost(p: Problem, *_: Any) -> Cost:
    entries = p.N * p.K
    moved = 2 * (p.N + p.F) * p.D + 10 * entries
    return Cost(moved, 2 * entries * p.D, gathered=2 * entries * p.D)


def index_add(values: Tensor, indices: Tensor, x: Tensor, F: int) -> Tensor:
    outer = (values[:, :, None] * x[:, None, :]).flatten(0, 1)
    return x.new_zeros(F, x.shape[1]).index_add_(0, indices.flatten(), outer)


# --- Adam -----------------------------------------------------------------------------------


def adam_inputs(p: Problem, moments: torch.dtype, T: int) -> tuple:
    weights = [p.weights(fp32) for _ in range(2)]
    firsts = [p.normal(p.F, p.D, dtype=moments, std=1e-3) for _ in weights]
    decoder, encoder = (
        Rows(W, first, first.square(), W.bfloat16())
        for W, first in zip(weights, firsts, strict=True)
    )
    (v, indices), d_v = p.codes(fp32), p.normal(p.N, p.K)
    runs = latent_major(indices, p.F)
    entries = (t.flatten()[runs.entry] for t in (v, d_v))
    error, x = (p.normal(p.N, p.D, dtype=bf16) for _ in range(2))
    v, d_v = entries
    gradients = RowGradients(runs, v, error, d_v, x)
    window = None
    if T > 1:
        updated = torch.zeros(p.F, dtype=torch.int32, device=p.device)
        window = Window(updated, torch.zeros(T, device=p.device))
    return decoder, encoder, gradients, window, [0]


def adam_step(
    decoder: Rows, encoder: Rows, g: RowGradients, window: Window | None, step: list[int]
) -> None:
    step[0] += 1
    adam_(decoder, encoder, g, AdamStep(step[0], 1e-5), window)


def adam_cost(p: Problem, decoder: Rows, encoder: Rows, g: RowGradients, window, _: Any) -> Cost:
    """Rows without a gradient are visited in every T-th step."""
    per_parameter = 26 if decoder.first.dtype == fp32 else 18
    visited = p.F
    if window is not None:
        busy = int((g.runs.start.diff() > 0).sum())
        visited = busy + (p.F - busy) / len(window.history)
    moved = 2 * per_parameter * visited * p.D + 4 * p.N * p.D
    entries = p.N * p.K
    return Cost(moved, 4 * entries * p.D, gathered=4 * entries * p.D)


def dense_adam_inputs(p: Problem) -> tuple:
    weights = [p.weights(fp32) for _ in range(2)]
    for W in weights:
        W.grad = p.normal(p.F, p.D)
    adam = torch.optim.Adam(weights, lr=1e-5, fused=True)
    adam.step()
    return adam, *weights, *(W.grad for W in weights)


def adam_op(name: str, moments: torch.dtype, T: int) -> Op:
    return Op(
        name=name,
        group="adam",
        make=partial(adam_inputs, moments=moments, T=T),
        run=adam_step,
        cost=adam_cost,
        others={"dense torch Adam": Way(lambda adam, *_: adam.step(), dense_adam_inputs)},
    )


def sort_cost(p: Problem, *_: Any) -> Cost:
    return Cost(p.N * p.K * (8 + 8 + 4 + 4) + 4 * p.F)


OPS: list[Op] = [
    *(
        Op(
            name=f"encode {name}",
            group=f"encode {name}",
            make=encode_inputs,
            run=encode_topk,
            cost=encode_cost,
            others=PLAIN,
            around=partial(encoding, name),
        )
        for name in FORMS
    ),
    simple(topk, pre_activations, topk_cost, torch_topk=torch.topk),
    simple(
        latent_major,
        lambda p: (p.indices(), p.F),
        sort_cost,
        torch_sort=lambda i, F: i.flatten().sort(stable=True),
    ),
    simple(
        decode,
        decode_inputs,
        decode_cost,
        embedding_bag=lambda v, i, W: embedding_bag(i, W, per_sample_weights=v, mode="sum"),
    ),
    simple(
        gather_dot,
        gather_inputs,
        gather_cost,
        index_and_bmm=lambda x, i, W: torch.bmm(W[i], x[:, :, None]),
    ),
    simple(squared_error, error_inputs, error_cost, in_parts=error_in_parts),
    simple(scatter_outer, scatter_inputs, scatter_cost, index_add_=index_add),
    adam_op("adam_", fp32, 1),
    adam_op("adam_, bf16 moments", bf16, 1),
    adam_op("adam_, bf16 moments, window 8", bf16, 8),
    *ACTIVATIONS,
]
