"""Every op at the widths, dictionaries and k that are trained, with few tokens: on a GPU."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import fastsae_kernels as ops
from bench.dense import rotation_dense
from bench.ops import adam_inputs
from bench.problem import Problem
from fastsae.train import Optimizer
from fastsae_kernels.adam import AdamStep, RowGradients, Rows, adam_
from fastsae_kernels.center import center, center_reference
from fastsae_kernels.dense_adam import adam_reference
from fastsae_kernels.encode import encode_topk_reference
from fastsae_kernels.encode_above import encode_above_reference
from fastsae_kernels.float8 import quantize_reference, quantize_rows
from fastsae_kernels.jumprelu import jumprelu_l0_reference, jumprelu_reference
from fastsae_kernels.latent_major import LatentMajor, latent_major
from fastsae_kernels.loss import squared_error_reference
from fastsae_kernels.rational import rational_reference
from fastsae_kernels.rescore import rescore, rescore_reference
from fastsae_kernels.rotation import rotation_gradients
from fastsae_kernels.sparse import decode_reference, gather_dot_reference, scatter_outer_reference
from fastsae_kernels.testing import assert_no_worse
from fastsae_kernels.topk import topk_reference
from fastsae_kernels.topk_batch import encode_topk_batch_reference, topk_batch_reference

pytestmark = pytest.mark.gpu
EVERY = True, True, True
NAMES = list("B" if os.environ.get("FASTSAE_TINY") else "ABCD")
every_shape = pytest.mark.parametrize("problem", NAMES, indirect=True)


def integers(p: Problem, *size: int, density: float = 1.0) -> Tensor:
    """-1, 0 or 1, and 0 again where density says so: every order of summation is exact."""
    whole = torch.randint(-1, 2, size, dtype=p.dtype, device=p.device)
    if density < 1:
        whole.mul_(torch.rand(size, device=p.device) < density)
    return whole


def encoder(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """x, W, b whose products bf16 holds exactly, with many ties."""
    x = integers(p, p.N, p.D, density=min(0.6, 400 / p.D))
    return x, integers(p, p.F, p.D), integers(p, p.F)


def planted(p: Problem) -> tuple[Tensor, Tensor]:
    """Signed values, and indices of which one is in every token."""
    values, indices = p.normal(p.N, p.K), p.indices()
    indices[:, 0] = p.F // 2
    return values, indices


def last(function: Callable, *more: Any) -> Callable:
    return lambda *arguments: function(*arguments, *more)


def same_dtype(function: Callable) -> Callable:
    """In one dtype: that of the sums is checked by tests/kernels."""
    return lambda values, *more: tuple(t.to(values.dtype) for t in function(values, *more))


def detached(function: Callable, *more: Any) -> Callable:
    return lambda *tensors: function(*(t.detach() for t in tensors), *more)


SMOOTH: dict[str, Callable[[Problem], tuple[Callable, Callable, tuple]]] = {
    "decode": lambda p: (ops.decode, decode_reference, (*planted(p), p.weights())),
    "gather_dot": lambda p: (
        ops.gather_dot, gather_dot_reference, (p.normal(p.N, p.D), planted(p)[1], p.weights()),
    ),
    "scatter_outer": lambda p: (
        ops.scatter_outer, scatter_outer_reference, (*planted(p), p.normal(p.N, p.D), p.F),
    ),
    "squared_error": lambda p: (
        same_dtype(ops.squared_error), same_dtype(squared_error_reference),
        (*planted(p), p.weights(), p.normal(p.D), p.normal(p.N, p.D)),
    ),
    "rational": lambda p: (
        last(ops.rational, 1.7, 0.8, 0.1), last(rational_reference, 1.7, 0.8, 0.1),
        (p.normal(p.N, p.K), p.normal(10), p.normal(8, std=0.3)),
    ),
    "jumprelu": lambda p: (
        last(ops.jumprelu, 0.3), last(jumprelu_reference, 0.3),
        (p.normal(p.N, p.F), p.normal(p.F).abs()),
    ),
    "jumprelu_l0": lambda p: (
        last(ops.jumprelu_l0, 0.3), last(jumprelu_l0_reference, 0.3),
        (p.normal(p.N, p.F), p.normal(p.F).abs()),
    ),
    "center": lambda p: (
        detached(center, p.dtype), detached(center_reference, p.dtype),
        (p.normal(p.N, p.D), p.normal(p.D)),
    ),
}  # fmt: skip
"""Op, reference and arguments: outputs and gradients err at most twice as much."""


@pytest.mark.core
@every_shape
@pytest.mark.parametrize("op", SMOOTH)
def test_smooth(op, problem):
    """With the real width and k, and few latents so that float64 fits."""
    p = problem._replace(N=8 if problem.dry else 160, F=4 * problem.K)
    assert_no_worse(*flat(SMOOTH[op](p)))


def flat(case: tuple[Callable, Callable, tuple]) -> tuple:
    op, reference, arguments = case
    return op, reference, *arguments


def autoencoder(p: Problem) -> tuple[Any, Any]:
    """Without a bias, so that the sums are exact."""
    x, W, b = encoder(p)
    V, c = integers(p, p.F, p.D), torch.zeros(p.D, dtype=p.dtype, device=p.device)
    values, indices = encode_topk_reference(x, W, b, p.K)
    expected = decode_reference(values, indices, V), values, indices
    return ops.encode_decode(x, W, b, V, c, p.K), expected


def sorted_entries(p: Problem) -> tuple[Any, Any]:
    """In the order of latents, tokens in order within; inactive ones at the end."""
    values, indices = planted(p)
    key = indices.where(values > 0, p.F).flatten()
    latent, entry = key.sort(stable=True)
    start = torch.bincount(latent, minlength=p.F + 1)[: p.F].cumsum(0)
    start = torch.nn.functional.pad(start, (1, 0)).int()
    expected = entry, (entry // p.K).int(), latent.int(), start
    return tuple(latent_major(indices, p.F, values > 0)), expected


EXACT: dict[str, Callable[[Problem], tuple[Any, Any]]] = {
    "encode_topk": lambda p: both(ops.encode_topk, encode_topk_reference, *encoder(p), p.K),
    "encode_topk abs": lambda p: both(
        ops.encode_topk, encode_topk_reference, *encoder(p), p.K, "abs"
    ),
    "topk": lambda p: both(ops.topk, topk_reference, integers(p, p.N, p.F), p.K),
    "encode_above": lambda p: both(ops.encode_above, encode_above_reference, *encoder(p), p.D**0.5),
    "encode_topk_batch": lambda p: both(
        ops.encode_topk_batch, encode_topk_batch_reference, *encoder(p), p.N * p.K
    ),
    "topk_batch": lambda p: both(
        ops.topk_batch, topk_batch_reference, integers(p, p.N, p.F), p.N * p.K
    ),
    "rescore": lambda p: both(rescore, rescore_reference, *encoder(p), p.indices(), p.K // 2 or 1),
    "quantize_rows": lambda p: both(quantize_rows, quantize_reference, p.weights()),
    "encode_decode": autoencoder,
    "latent_major": sorted_entries,
}
"""What our op and its reference make of whole numbers, whose products and sums are exact."""


def both(op: Callable, reference: Callable, *arguments: Any) -> tuple[Any, Any]:
    return op(*arguments), reference(*arguments)


@pytest.mark.core
@every_shape
@pytest.mark.parametrize("op", EXACT)
def test_exact(op, problem):
    """Values, indices and ties are those of the reference, in the real dictionary."""
    p = problem._replace(N=4)
    for got, expected in zip(*EXACT[op](p), strict=True):
        assert got.dtype == expected.dtype and got.shape == expected.shape
        parts = (torch.atleast_1d(t).split(1 << 16) for t in (got, expected))  # for memory
        for one, two in zip(*parts, strict=True):
            torch.testing.assert_close(one.float(), two.float(), rtol=0, atol=0)


@pytest.mark.core
@every_shape
@pytest.mark.parametrize("op", ["rotation_gradients"])
@pytest.mark.parametrize("mode", ["support", "dense"])
def test_rotation_gradients(op, mode, problem):
    """Against the formula with all pre-activations written out."""
    p = problem._replace(N=8 if problem.dry else 160, F=min(problem.F, 4 * problem.D))
    p = p._replace(dtype=torch.float32)
    x, W_enc, b_enc = p.normal(p.N, p.D), p.weights(), p.normal(p.F)
    code = topk_reference(torch.addmm(b_enc, x, W_enc.t()), p.K)
    gradients = p.normal(p.N, p.D), p.normal(p.N, p.K)
    ours, reference = detached(rotation_gradients, mode, EVERY), detached(rotation_dense, mode)
    assert_no_worse(ours, reference, x, W_enc, b_enc, p.weights(), *code, *gradients)


# --- Adam -----------------------------------------------------------------------------------

AT = AdamStep(7, 1e-3)


def adam_dense(runs: LatentMajor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Weights and moments of decoder and encoder after a step from dense gradients."""
    results = ()
    for unit, (W, m, v, weights, x) in zip((True, False), (tensors[:5], tensors[5:]), strict=True):
        terms = weights.to(W.dtype)[:, None] * x.to(W.dtype)[runs.token.long()]
        g = torch.zeros_like(W).index_add(0, runs.latent.long(), terms)
        results += adam_reference(W, m, v, g, AT, unit)
    return tuple(t.detach() for t in results)


def adam_kernel(runs: LatentMajor, *tensors: Tensor) -> tuple[Tensor, ...]:
    tensors = tuple(t.detach().clone() for t in tensors)
    W, m, v, values, error, *others = tensors
    W_enc, m_enc, v_enc, d_values, x = others
    decoder, encoder = Rows(W, m, v), Rows(W_enc, m_enc, v_enc)
    adam_(decoder, encoder, RowGradients(runs, values, error, d_values, x), AT)
    return *decoder[:3], *encoder[:3]


@pytest.mark.core
@every_shape
@pytest.mark.parametrize("second", ["entry", "row"])
@pytest.mark.parametrize("op", ["adam_"])
def test_adam(op, second, problem):
    """Rows with many tokens and with none, from moments that are not 0."""
    p = problem._replace(N=9 if problem.dry else 160, F=24, K=2)
    decoder, encoder, g, *_ = adam_inputs(p, Optimizer(adam_second=second))
    tensors = *decoder[:3], g.values, g.error, *encoder[:3], g.d_values, g.x
    assert_no_worse(partial(adam_kernel, g.runs), partial(adam_dense, g.runs), *tensors)
