"""Correctness on the device, before anything is timed: each op against its reference.

Outputs are poisoned: torch.empty is filled with NaN. A check belongs to a group, and ops of a group
with a failure are not timed.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsae_kernels import decode, gather_dot, scatter_outer, squared_error
from fastsae_kernels.latent_major import latent_major
from fastsae_kernels.loss import squared_error_reference
from fastsae_kernels.rational import rational, rational_reference
from fastsae_kernels.sparse import (
    decode_reference,
    gather_dot_reference,
    scatter_outer_reference,
)
from fastsae_kernels.testing import assert_no_worse

from .data import Problem

bf16, fp32 = torch.bfloat16, torch.float32


STEP_GROUPS = (
    "step",
    "adam",
    "squared_error",
    "topk",
    "encode cublas",
    "latent_major",
    "scatter_outer",
)
"""What a step is made of."""

FIRST_GROUPS = (*STEP_GROUPS, "encode triton")
"""What is checked before any step or kernel is timed."""

DRAWS = 3
"""How often an input is drawn where the first one fails: most of them have to pass."""


class Check(NamedTuple):
    group: str
    name: str
    run: Callable[[], object]
    first: bool = False
    """Whether it comes before anything is timed."""


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill torch.empty with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def outcome(check: Check) -> dict[str, Any]:
    """Raises what the check raises; an assertion has to fail in most draws of its inputs."""
    unlucky: list[AssertionError] = []
    for seed in range(DRAWS):
        torch.manual_seed(seed)
        try:
            with poisoned():
                check.run()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
        except AssertionError as problem:
            unlucky.append(problem.with_traceback(None))
        if len(unlucky) > DRAWS // 2:
            raise unlucky[0]
        if not unlucky:
            break
    said = {"unlucky": str(unlucky[0]).strip()[:300]} if unlucky else {}
    return {"group": check.group, "ok": True} | said


def sizes(problems: list[Problem]) -> Iterator[Problem]:
    """Awkward shapes, then the real widths and k with few tokens and latents."""
    awkward = [(7, 33, 20, 3), (131, 20, 40, 2), (5, 1030, 9, 4)]
    for N, D, F, K in awkward[:1] if problems[0].rehearsal else awkward:
        yield Problem("", N, D, F, K, problems[0].device)
    for p in problems:
        yield few(p)


def fewer_sizes(problems: list[Problem]) -> Iterator[Problem]:
    """Of ops that see no more than a list of numbers."""
    real = [p for p in problems if p.name == "C"]
    yield from [p for p in sizes(problems) if not p.name][:2]
    yield from map(few, real)


def few(p: Problem) -> Problem:
    return p.of(N=8 if p.rehearsal else 160, F=4 * p.K)


def label(p: Problem, *words: object) -> str:
    return " ".join([*map(str, words), p.name, f"N{p.N}-D{p.D}-F{p.F}-K{p.K}"]).replace("  ", " ")


# --- one entry per op: what is called, its reference, and arguments ---------------------------

Case = tuple[Callable, Callable, tuple]


def planted(p: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Signed values, and indices of which one is in every token."""
    values, indices = p.normal(p.N, p.K, dtype=dtype), p.indices()
    indices[:, 0] = p.F // 2
    return values, indices


def decode_case(p: Problem, dtype: torch.dtype) -> Case:
    return decode, decode_reference, (*planted(p, dtype), p.weights(dtype))


def gather_dot_case(p: Problem, dtype: torch.dtype) -> Case:
    arguments = p.normal(p.N, p.D, dtype=dtype), planted(p, dtype)[1], p.weights(dtype)
    return gather_dot, gather_dot_reference, arguments


def scatter_outer_case(p: Problem, dtype: torch.dtype) -> Case:
    arguments = *planted(p, dtype), p.normal(p.N, p.D, dtype=dtype), p.F
    return scatter_outer, scatter_outer_reference, arguments


def squared_error_case(p: Problem, dtype: torch.dtype) -> Case:
    """In one dtype: that of the sums is checked by the tests."""

    def narrow(function: Callable) -> Callable:
        return lambda *arguments: tuple(t.to(dtype) for t in function(*arguments))

    b, target = p.normal(p.D, dtype=dtype), p.normal(p.N, p.D, dtype=dtype)
    arguments = *planted(p, dtype), p.weights(dtype), b, target
    return narrow(squared_error), narrow(squared_error_reference), arguments


def rational_case(p: Problem, dtype: torch.dtype, shifted: bool = False) -> Case:
    """The coefficients in one tensor, so that the largest error of all their gradients counts."""

    def packed(function: Callable) -> Callable:
        def run(h, coefficients, *shift):
            a, b, rest = coefficients.split([10, 8, 3])
            c_in, c_out, constant = rest.unbind()
            return function(h, a, b, c_in, c_out, *(shift or (constant,)))

        return run

    scalars = torch.tensor([1.7, 0.8, 0.1], device=p.device)
    coefficients = torch.cat([p.normal(10), p.normal(8, std=0.3), scalars])
    h = p.normal(p.N, p.F if shifted else p.K, dtype=dtype)
    arguments = (h, coefficients, p.normal(p.F)) if shifted else (h, coefficients)
    return packed(rational), packed(rational_reference), arguments


def jumprelu_case(p: Problem, dtype: torch.dtype, l0: bool = False) -> Case:
    module = import_module("fastsae_kernels.jumprelu")
    stem = "jumprelu_l0" if l0 else "jumprelu"
    op, reference = getattr(module, stem), getattr(module, f"{stem}_reference")
    h, threshold = p.normal(p.N, p.F, dtype=dtype), p.normal(p.F, dtype=dtype).abs()
    return partial_last(op, 0.3), partial_last(reference, 0.3), (h, threshold)


def partial_last(function: Callable, *last: Any) -> Callable:
    return lambda *arguments: function(*arguments, *last)


CASES: dict[str, tuple[str, Callable[..., Case], dict[str, Any]]] = {
    "decode": ("decode", decode_case, {}),
    "gather_dot": ("gather_dot", gather_dot_case, {}),
    "scatter_outer": ("scatter_outer", scatter_outer_case, {}),
    "squared_error": ("squared_error", squared_error_case, {}),
    "rational support": ("rational", rational_case, {}),
    "rational shifted": ("rational", rational_case, {"shifted": True}),
    "jumprelu": ("jumprelu", jumprelu_case, {}),
    "jumprelu_l0": ("jumprelu", jumprelu_case, {"l0": True}),
}
"""Name: group, what makes the case, its settings. Checked at every size, in fp32 and bf16."""


def no_worse(make: Callable[..., Case], p: Problem, dtype: torch.dtype, **settings: Any) -> None:
    op, reference, arguments = make(p, dtype, **settings)
    assert_no_worse(op, reference, *arguments)


def short(dtype: torch.dtype) -> str:
    return {bf16: "bf16", fp32: "fp32"}.get(dtype, str(dtype))


def latent_major_check(p: Problem) -> None:
    """Entries in the order of latents, tokens in order within; inactive ones at the end."""
    values, indices = planted(p, fp32)
    runs = latent_major(indices, p.F, values > 0)
    key = indices.where(values > 0, p.F).flatten()
    order = key.cpu().sort(stable=True)
    assert torch.equal(runs.entry.cpu(), order.indices)
    assert torch.equal(runs.latent.cpu().long(), order.values)
    assert torch.equal(runs.token.cpu().long(), order.indices // p.K)
    starts = torch.bincount(order.values, minlength=p.F + 1)[: p.F].cumsum(0)
    assert torch.equal(runs.start.cpu()[1:].long(), starts)


def far_check(p: Problem, name: str) -> None:
    """Rows of W that lie beyond 2^31 entries give what they give alone."""
    W = p.weights(bf16)
    last = p._replace(N=min(p.N, 64), F=min(p.F // 2, 2048))
    shift = p.F - last.F
    (v, i), x = last.codes(), last.normal(last.N, p.D, dtype=bf16)
    calls: dict[str, Callable[[Tensor, Tensor], Any]] = {
        "decode": lambda i, W: decode(v, i, W),
        "gather_dot": lambda i, W: gather_dot(x, i, W),
        "squared_error": lambda i, W: squared_error(v, i, W, x.new_zeros(p.D), x),
        "scatter_outer": lambda i, W: scatter_outer(v, i, x, len(W)),
    }
    far, near = calls[name](i + shift, W), calls[name](i, W[shift:])
    if name == "scatter_outer":
        assert not far[:shift].any()
        far = far[shift:]
    for one, two in zip(far, near, strict=True):
        assert torch.equal(one, two)


def sparse_checks(problems: list[Problem]) -> Iterator[Check]:
    for name, (group, make, settings) in CASES.items():
        elementwise = group in ("rational", "jumprelu")
        for p in fewer_sizes(problems) if elementwise else sizes(problems):
            for dtype in (fp32, bf16):
                run = partial(no_worse, make, p, dtype, **settings)
                yield Check(group, label(p, name, short(dtype)), run, group in FIRST_GROUPS)
    for p in sizes(problems):
        run = partial(latent_major_check, p)
        yield Check("latent_major", label(p, "latent_major"), run, first=True)
    largest = max(problems, key=lambda p: p.F * p.D)
    if largest.rehearsal or largest.F * largest.D >= 2**31:
        for name in ("decode", "gather_dot", "squared_error", "scatter_outer"):
            run = partial(far_check, largest, name)
            yield Check(name, label(largest, name, "beyond 2^31 entries"), run)
