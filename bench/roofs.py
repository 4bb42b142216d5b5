"""Measures the machine's roof: the bandwidth of a copy and the FLOP/s of large GEMMs."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn.functional import linear

from fastsae.device import tf32_products

from .clock import measure, significant
from .problem import DTYPES, Problem

Row = dict[str, Any]


class Cost(NamedTuple):
    """The least work of an op."""

    bytes: float
    """Inputs read once, outputs written once."""
    flops: float = 0.0
    rate: str = "fp32"
    """Precision whose measured FLOP/s apply."""
    gathered: float = 0.0
    """Bytes of rows that are picked by indices, counted each time they are picked."""


class Roofs(NamedTuple):
    """The rates that this machine reached in this run."""

    bandwidth: float
    """Bytes per second that a copy reads and writes; NaN if unknown."""
    rates: dict[str, float]
    """FLOP/s of square GEMMs, by precision."""

    def ms(self, cost: Cost) -> float:
        """The least time of an op, limited by memory or by arithmetic."""
        flops = cost.flops / self.rates.get(cost.rate, math.nan) if cost.flops else 0.0
        return 1e3 * max(flops, cost.bytes / self.bandwidth)


PRODUCTS = {**DTYPES, "tf32": torch.float32, "fp8": torch.float8_e4m3fn}


def product(p: Problem, kind: str) -> tuple[Callable[..., object], tuple]:
    """The encoder GEMM, x W^T for all tokens at once, and its arguments.

    `linear` adds a bias, which is far slower if the library has no fused epilogue for it.
    """
    if kind == "linear":
        return linear, (p.normal(p.N, p.D), p.normal(p.F, p.D), p.normal(p.F))
    dtype = PRODUCTS[kind]
    x, W = (p.normal(n, p.D, dtype=torch.bfloat16).to(dtype) for n in (p.N, p.F))
    if kind != "fp8":
        out = torch.empty(p.N, p.F, dtype=dtype, device=p.device)
        return lambda x, W: torch.mm(x, W.t(), out=out), (x, W)
    rows, columns = torch.ones(p.N, 1, device=p.device), torch.ones(1, p.F, device=p.device)
    # The last argument enables fast accumulation, as in fastsae_kernels' scaled_product.
    scaled: Any = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage]
    return scaled, (x, W.t(), rows, columns, None, None, torch.bfloat16, True)


def product_row(p: Problem, kind: str, budget: float = 100, space: bool = True) -> Row:
    """Time and FLOP/s of a GEMM."""
    with tf32_products(kind == "tf32"):
        run, inputs = product(p, kind)
        row = measure(run, [inputs], p.device, budget, space=space, dry=p.dry)
    return row | {"TFLOP/s": significant(2 * p.N * p.D * p.F / row["ms"]["median"] / 1e9)}


def copy_row(p: Problem, budget: float = 200.0, space: bool = True) -> Row:
    """Time and bandwidth of a copy within the device: 4 GB on a GPU, 256 MB on a CPU."""
    size = 1 << (20 if p.dry else 30 if p.device.type == "cuda" else 26)
    source = p.normal(size, dtype=torch.float32)
    target = torch.empty_like(source)
    row = measure(lambda: target.copy_(source), [()], p.device, budget, space=space, dry=p.dry)
    return row | {"GB/s": significant(2 * source.nbytes / row["ms"]["median"] / 1e6)}


def square(p: Problem) -> Problem:
    """The square GEMM whose rate is the roof."""
    side = 64 if p.dry else 8192 if p.device.type == "cuda" else 2048
    return p._replace(name="square", N=side, D=side, F=side)


def roofs_from(rows: dict[str, Row]) -> Roofs:
    """Roofs from the rows of a copy and of square GEMMs."""
    rates = {kind: rows.get(f"{kind} square", {}).get("TFLOP/s") for kind in PRODUCTS}
    bandwidth = rows.get("copy", {}).get("GB/s", math.nan) * 1e9
    return Roofs(bandwidth, {kind: rate * 1e12 for kind, rate in rates.items() if rate})


def measure_roofs(p: Problem, kinds: set[str]) -> Roofs:
    squares = {f"{kind} square": product_row(square(p), kind) for kind in sorted(kinds)}
    return roofs_from({"copy": copy_row(p), **squares})
