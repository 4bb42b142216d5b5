"""Checks of the encoder and of top-k, which must be exact at ties."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import get_args
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastsae_kernels import _encode_kernel, encode_topk, topk
from fastsae_kernels import encode as encode_module
from fastsae_kernels._encode_kernel import Tiles, launch_encode
from fastsae_kernels._launch import INTERPRET, buffer_bytes
from fastsae_kernels.encode import encode_topk_reference
from fastsae_kernels.encode_decode import Gradient, encode_decode, encode_decode_reference
from fastsae_kernels.testing import assert_no_worse
from fastsae_kernels.topk import By, topk_reference

from .checks import Check, bf16, fp32, label, short
from .clock import peak_bytes
from .data import Problem

FORMS = "cublas", "triton"
"""Who multiplies: cuBLAS, then a pass over its product; or our kernel, with the groups' maxima."""

BYS: tuple[By, By] = ("value", "abs")


@contextmanager
def form(name: str) -> Iterator[None]:
    """Let the encoder multiply in this form; where it is interpreted, in small tiles."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(encode_module, "ENCODER", name))
        if INTERPRET:
            small = Tiles(16, 32, 32, 4, 2)
            stack.enter_context(patch.object(_encode_kernel, "tiles_for", lambda x: small))
        yield


@contextmanager
def tf32() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def encoder_dtype(p: Problem) -> torch.dtype:
    """bf16, but Triton's interpreter multiplies that wrongly."""
    return fp32 if p.rehearsal else bf16


def assert_same(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Equal indices, and equal values, NaN included."""
    wrong = (got[1] != expected[1]).any(1)
    assert not wrong.any(), f"indices differ in {int(wrong.sum())} of {len(wrong)} rows"
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=0, equal_nan=True)


def whole_numbers(p: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, W, b whose products bf16 holds exactly: many ties."""
    density = min(0.6, 400 / p.D)
    x = p.integers(p.N, p.D, dtype=dtype, density=density)
    return x, p.integers(p.F, p.D, dtype=dtype), p.integers(p.F, dtype=dtype)


def needs_maxima(x: Tensor, F: int, k: int) -> None:
    assert encode_module._with_maxima(x, F, k), "this shape does not reach the kernel"


def exact_check(p: Problem, name: str, by: By, dtype: torch.dtype) -> None:
    """Planted integers: values, indices and ties are those of the reference."""
    x, W, b = whole_numbers(p, dtype)
    with form(name), tf32():
        if name == "triton":
            needs_maxima(x, p.F, p.K)
        got = encode_topk(x, W, b, p.K, by)
        assert_same(got, encode_topk_reference(x, W, b, p.K, by))


def rounded_check(p: Problem, name: str, by: By, dtype: torch.dtype) -> None:
    """Random inputs: the exact choice from the pre-activations as they were rounded, which err no
    more than twice as much as those of `linear`."""
    x, W, b = p.normal(p.N, p.D, dtype=dtype), p.weights(dtype), p.normal(p.F, dtype=dtype)
    with form(name), tf32():
        if name == "triton":
            needs_maxima(x, p.F, p.K)
            pre = launch_encode(x, W, b, by)[0]
        else:
            pre = encode_module._product(x, W, b)
        assert_same(encode_topk(x, W, b, p.K, by), topk_reference(pre, p.K, by))
        exact = linear(x.double(), W.double(), b.double())
        error, allowed = ((h - exact).abs().max() for h in (pre, linear(x, W, b)))
    rounding = torch.finfo(dtype).eps * exact.abs().max()
    assert error <= 2 * allowed + rounding, f"error {error:.1e} > 2 * {allowed:.1e}"


def hard_check(p: Problem, by: By, dtype: torch.dtype) -> None:
    """NaN, all negative, constant, and large neighbours that overflow the room for candidates."""
    F = 128 if p.rehearsal else 2048
    W, b = torch.eye(F, dtype=dtype, device=p.device), p.integers(F, dtype=dtype) * 0
    x = p.normal(6, F, dtype=dtype)
    x[0, 5] = float("nan")
    x[1] = -x[1].abs()
    x[2] = 1.5
    x[3, ::8] += 10
    x[4, :32] = 7.0
    with form("triton"), tf32():
        needs_maxima(x, F, 8)
        values, indices = encode_topk(x, W, b, 8, by)
        expected = encode_topk_reference(x[1:], W, b, 8, by)
    assert values[0].isnan().all(), "NaN times 0 is NaN in every latent"
    assert_same((values[1:], indices[1:]), expected)


def clear(p: Problem, by: By, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, W, b with only those tokens whose k + 1 largest no rounding can exchange."""
    x, W, b = p.normal(50 * p.N, p.D, dtype=dtype), p.weights(dtype), p.normal(p.F, dtype=dtype)
    h = linear(x.double(), W.double(), b.double())
    ranks = (h.abs() if by == "abs" else h).topk(min(p.K + 1, p.F)).values
    apart = -ranks.diff(dim=1) > 8 * torch.finfo(dtype).eps * h.abs().amax(1, keepdim=True)
    return x[apart.all(1)][: p.N], W, b


def gradient_check(p: Problem, by: By, dtype: torch.dtype) -> None:
    """All outputs and gradients."""
    x, W, b = clear(p, by, dtype)
    assert len(x), "no token is clear enough: ask for a smaller k"
    with form("cublas"):
        assert_no_worse(
            lambda x, W, b: encode_topk(x, W, b, p.K, by),
            lambda x, W, b: encode_topk_reference(x, W, b, p.K, by),
            *(x, W, b),
        )


def encode_decode_check(p: Problem, gradient: Gradient) -> None:
    arguments = p.normal(p.N, p.D), p.weights(fp32), p.normal(p.F), p.weights(fp32), p.normal(p.D)
    assert_no_worse(
        lambda x, W, b, V, c: encode_decode(x, W, b, V, c, p.K, "value", gradient),
        lambda x, W, b, V, c: encode_decode_reference(x, W, b, V, c, p.K, "value", gradient),
        *arguments,
    )


def rows(p: Problem, kind: str) -> Tensor:
    """Pre-activations that are hard to choose from."""
    pre = p.normal(p.N, p.F)
    if kind == "ties":
        pre = torch.randint(-3, 4, (p.N, p.F), device=p.device).float()
    elif kind == "negative":
        pre = -pre.abs() - 0.1
    elif kind == "constant":
        planted = torch.tensor([1.5, -1.5, 0.0, torch.inf, -torch.inf, torch.nan])
        pre = planted.to(p.device)[torch.arange(p.N) % 6, None].repeat(1, p.F)
    elif kind == "neighbours":
        pre[:, : p.F // 4] += 10
    elif kind == "NaN":
        pre[0, p.F // 3] = pre[-1, ::2] = torch.nan
    return pre


ROWS = "random", "ties", "negative", "constant", "neighbours", "NaN"


def topk_check(p: Problem, kind: str, by: By, dtype: torch.dtype) -> None:
    pre = rows(p, kind).to(dtype)
    assert_same(topk(pre, p.K, by), topk_reference(pre, p.K, by))


def topk_gradient_check(p: Problem, by: By, dtype: torch.dtype) -> None:
    pre = p.normal(p.N, p.F, dtype=dtype)
    op, reference = (lambda pre, f=f: f(pre, p.K, by) for f in (topk, topk_reference))
    assert_no_worse(op, reference, pre)


def memory_check(p: Problem, name: str) -> None:
    """No more than the byte budget, a sixteenth of it for maxima, and what a row's choice needs."""
    dtype = encoder_dtype(p)
    x, W = p.normal(p.N, p.D, dtype=dtype), p.weights(dtype)
    b = p.normal(p.F, dtype=dtype)

    def run() -> None:
        encode_topk(x, W, b, p.K)

    with form(name), tf32():
        run()
        peak = peak_bytes(run, p.device)
    results = p.N * p.K * (8 + x.itemsize) * 2
    budget = buffer_bytes(p.device)
    allowed = budget + budget // 8 + results
    assert peak <= allowed, f"{peak / 2**20:.0f} MB, a budget of {budget / 2**20:.0f} MB"


def topk_checks(problems: list[Problem]) -> Iterator[Check]:
    device = problems[0].device
    rehearsal = problems[0].rehearsal
    shapes = ((100, 9),) if rehearsal else ((1, 1), (37, 37), (3000, 20))
    cases = [(Problem("", 6, 1, F, k, device), ROWS) for F, k in shapes]
    cases += [(p.of(N=4), ("random", "ties", "neighbours")) for p in problems]
    for p, kinds in cases:
        for kind in kinds:
            for by in BYS:
                for dtype in (bf16,) if rehearsal else (fp32, bf16):
                    run = partial(topk_check, p, kind, by, dtype)
                    first = bool(p.name) and dtype == bf16
                    yield Check("topk", label(p, "topk", kind, by, short(dtype)), run, first)
    wide = Problem("", 3, 1, 3000, 2999, device)  # more than the kernel takes
    yield Check("topk", label(wide, "topk ties"), partial(topk_check, wide, "ties", "value", fp32))
    small = Problem("", 7, 1, 40, 5, device)
    for by in BYS:
        run = partial(topk_gradient_check, small, by, fp32)
        yield Check("topk", label(small, "topk gradient", by), run)


def gradient_sizes(problems: list[Problem]) -> Iterator[tuple[Problem, torch.dtype]]:
    """bf16 only where tokens exist that are clear in it."""
    small, all_active = (
        Problem("", *s, problems[0].device) for s in ((7, 33, 20, 3), (5, 3, 20, 20))
    )
    yield from ((small, fp32), (small, bf16), (all_active, fp32))
    for p in problems:
        yield p.of(N=8, F=16 * p.K)._replace(K=min(p.K, 4)), fp32


def encode_checks(problems: list[Problem]) -> Iterator[Check]:
    device = problems[0].device
    rehearsal = problems[0].rehearsal
    shapes = [(7, 33, 70, 8)] if rehearsal else [(7, 33, 70, 8), (150, 20, 700, 16)]
    odd = [Problem("", *s, device) for s in shapes]
    real = [p.of(N=8 if rehearsal else 150) for p in problems]
    for name in FORMS:
        for p in [*odd, *real]:
            for by in BYS if p in odd else BYS[:1]:
                words, first = (f"encode {name}", by), bool(p.name)
                dtype = encoder_dtype(p)
                run = partial(exact_check, p, name, by, dtype)
                yield Check(words[0], label(p, *words, "integers"), run, first)
                run = partial(rounded_check, p.of(F=8192), name, by, dtype)
                yield Check(words[0], label(p.of(F=8192), *words, "random"), run, first)
    for by in BYS:
        run = partial(hard_check, problems[0], by, encoder_dtype(problems[0]))
        yield Check("encode triton", f"encode triton {by} hard rows", run)
    for p, dtype in gradient_sizes(problems):
        for by in BYS:
            run = partial(gradient_check, p, by, dtype)
            yield Check("encode gradients", label(p, "encode gradients", by, short(dtype)), run)
    for gradient in get_args(Gradient):
        p = Problem("", 7, 5, 20, 3, device)
        yield Check(
            "encode_decode", f"encode_decode {gradient}", partial(encode_decode_check, p, gradient)
        )
    for p in problems:
        for name in FORMS:
            yield Check(
                "memory", label(p, "memory of encode", name), partial(memory_check, p, name)
            )
