"""The training step at real widths, its determinism, memory and 64-bit offsets: on a GPU."""

import copy
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.clock import peak_bytes
from bench.dense import DenseTopK, dense_adam, dense_step
from bench.problem import Problem
from fastsae import SAE, TopK
from fastsae.losses import Objective
from fastsae.train.optim import Adam, Optimizer
from fastsae.train.step import fused_step
from fastsae_kernels import decode, encode_topk, gather_dot, scatter_outer, squared_error
from fastsae_kernels._launch import buffer_bytes
from fastsae_kernels.adam import AdamStep, RowGradients, Rows, adam_
from fastsae_kernels.latent_major import latent_major

pytestmark = pytest.mark.gpu
NAMES = list("B" if os.environ.get("FASTSAE_TINY") else "ABCD")
every_shape = pytest.mark.parametrize("problem", NAMES, indirect=True)
largest = pytest.mark.parametrize("problem", ["D"], indirect=True)
LR = 1e-2
SHADOWS = "W_enc", "W_dec"


def small(p: Problem) -> Problem:
    """With the real width and k."""
    return p._replace(F=8) if p.dry else p._replace(N=256, F=16 * p.K)


def start(p: Problem) -> tuple[SAE, Tensor, Tensor]:
    """An SAE, tokens, and a fifth of the latents, which are dead."""
    sae = SAE(p.D, p.F, TopK(p.K))
    with torch.no_grad():
        sae.b_enc.normal_(std=0.1)
        sae.b_dec.normal_()
    x = p.normal(p.N, p.D, dtype=torch.float32)
    return sae.to(p.device), x, torch.arange(0, p.F, 5, device=p.device)


def updates(take: Callable[[SAE, Tensor], object], sae: SAE, x: Tensor) -> dict[str, Tensor]:
    """What a step adds to each parameter."""
    model = copy.deepcopy(sae).to(x.dtype)
    take(model, x)
    before = dict(sae.named_parameters())
    return {name: (p - before[name]).detach() for name, p in model.named_parameters()}


@pytest.mark.core
@every_shape
@pytest.mark.parametrize("op", ["step"])
@pytest.mark.parametrize("some_dead", [False, True])
def test_the_bf16_step(op, some_dead, problem):
    """Its update errs at most twice as much as that of dense PyTorch with products in bf16.

    In norm: Adam's first step is a sign, and four of them may differ from the exact ones.
    """
    p = small(problem)
    sae, x, dead = start(p)
    mask = torch.zeros(p.F, dtype=torch.bool, device=p.device).index_fill(0, dead, True)

    def ours(model: SAE, x: Tensor) -> None:
        adam = Adam(model, shadows=SHADOWS)
        adam.begin_step(LR)
        fused_step(model, adam, x, dead if some_dead else None, Objective())

    def theirs(model: SAE, x: Tensor) -> None:
        dense = DenseTopK(model)
        low = x.dtype == torch.float32
        dense_step(dense, dense_adam(dense, LR), x, mask if some_dead else None, p.D // 2, low)
        model.load_state_dict(dense.state_dict())

    exact, same = updates(theirs, sae, x.double()), updates(theirs, sae, x)
    for name, got in updates(ours, sae, x).items():
        error, allowed = ((t - exact[name]).norm() for t in (got, same[name]))
        signs = 2 * LR * 4**0.5
        assert error <= 2 * allowed + signs, f"{name}: {error:.1e} > 2 * {allowed:.1e}"


@every_shape
def test_steps_give_the_same_bits_twice(problem):
    torch.use_deterministic_algorithms(False)  # the step alone has to see to that
    p, states = small(problem), []
    sae, x, dead = start(p)
    for _ in range(2):
        model = copy.deepcopy(sae)
        options = Optimizer(adam_moments="bf16", adam_window=4)
        adam = Adam(model, options, shadows=SHADOWS)
        for _ in range(1 if p.dry else 3):
            adam.begin_step(LR)
            fused_step(model, adam, x, dead, Objective())
        states.append({**model.state_dict(), **adam.state_dict()})
    differing = [name for name in states[0] if not torch.equal(states[0][name], states[1][name])]
    assert not differing


@every_shape
def test_memory_of_the_encoder(problem):
    """The budget of pre-activations, an eighth for what a row's choice needs, and the results."""
    p = problem
    x, W, b = p.normal(p.N, p.D), p.weights(), p.normal(p.F)

    def run() -> None:
        encode_topk(x, W, b, p.K)

    run()
    peak, budget = peak_bytes(run, p.device) or 0, buffer_bytes(p.device)
    results = p.N * p.K * (8 + x.itemsize) * 2
    assert peak <= budget + budget // 8 + results, f"{peak >> 20} MB, budget {budget >> 20} MB"


@largest
@pytest.mark.parametrize("op", ["decode", "gather_dot", "squared_error", "scatter_outer"])
def test_rows_beyond_2_to_the_31_entries(op, problem):
    """They give what they give alone."""
    p, W = problem, problem.weights()
    last = p._replace(N=min(p.N, 64), F=min(p.F // 2, 2048))
    shift = p.F - last.F
    (v, i), x = last.codes(), last.normal(last.N, p.D)
    calls: dict[str, Callable[[Tensor, Tensor], Any]] = {
        "decode": lambda i, W: decode(v, i, W),
        "gather_dot": lambda i, W: gather_dot(x, i, W),
        "squared_error": lambda i, W: squared_error(v, i, W, x.new_zeros(p.D), x),
        "scatter_outer": lambda i, W: scatter_outer(v, i, x, len(W)),
    }
    far, near = calls[op](i + shift, W), calls[op](i, W[shift:])
    if op == "scatter_outer":
        assert not far[:shift].any()
        far = far[shift:]
    for one, two in zip(far, near, strict=True):
        assert torch.equal(one, two)


def padded(W: Tensor, F: int) -> Rows:
    """W behind so many rows, each with a 1, that there are F."""
    whole = W.new_zeros(F, W.shape[1])
    whole[:, 0] = 1.0
    whole[-len(W) :] = W
    first, second = (torch.zeros_like(whole, dtype=torch.bfloat16) for _ in range(2))
    return Rows(whole, first, second)


@largest
@pytest.mark.parametrize("op", ["adam_"])
def test_adam_beyond_2_to_the_31_entries(op, problem):
    """Far rows get the update that they get alone; rows without a gradient stay."""
    F = 18 if problem.dry else (1 << 31) // problem.D + 64
    near = problem._replace(N=4 if problem.dry else 40, F=16)
    (values, indices), d_values = near.codes(torch.float32), near.normal(near.N, near.K)
    error, x = near.normal(near.N, near.D), near.normal(near.N, near.D)
    weights, results = [near.weights(torch.float32) for _ in range(2)], []
    for size in (near.F, F):
        states = decoder, encoder = [padded(W, size) for W in weights]
        runs = latent_major(indices + size - near.F, size)
        v, d_v = (t.float().flatten()[runs.entry] for t in (values, d_values))
        adam_(decoder, encoder, RowGradients(runs, v, error, d_v, x), AdamStep(1, LR))
        assert all((state.weight[: -near.F, 0] == 1).all() for state in states)
        results.append([state.weight[-near.F :].clone() for state in states])
        del states, decoder, encoder
    assert all(map(torch.equal, *results))
