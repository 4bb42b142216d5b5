"""What this machine can do at best, measured: bytes copied and FLOPs of large products a second."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastsae.device import tf32_products

from .clock import digits, measure
from .problem import Problem


class Cost(NamedTuple):
    """The least that an op has to do."""

    bytes: float
    """Inputs read once, outputs written once."""
    flops: float = 0.0
    rate: str = "fp32"
    """Which of the measured rates serves its FLOPs."""
    gathered: float = 0.0
    """Bytes that it reads in rows picked by indices, each as often as it is picked."""


class Roofs(NamedTuple):
    """What this machine reached in this run; NaN where that is not known."""

    bandwidth: float
    """Bytes per second of a copy, read and written."""
    rates: dict[str, float]
    """FLOP/s of square products, by precision."""

    def ms(self, cost: Cost) -> float:
        """The least time of an op: its bytes, or its FLOPs."""
        flops = cost.flops / self.rates.get(cost.rate, math.nan) if cost.flops else 0.0
        return 1e3 * max(flops, cost.bytes / self.bandwidth)


PRECISIONS = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "fp32": torch.float32,
    "fp8": torch.float8_e4m3fn,
}


def product(p: Problem, precision: str) -> tuple[Callable[..., object], tuple[Tensor, ...]]:
    """The encoder's GEMM, x W^T without bias for all tokens at once, and its arguments."""
    dtype = PRECISIONS[precision]
    if precision != "fp8":
        out = torch.empty(p.N, p.F, dtype=dtype, device=p.device)
        inputs = p.normal(p.N, p.D, dtype=dtype), p.normal(p.F, p.D, dtype=dtype)
        return lambda x, W: torch.mm(x, W.t(), out=out), inputs
    x, W = p.normal(p.N, p.D).to(dtype), p.normal(p.F, p.D).to(dtype)
    scales = torch.ones(p.N, 1, device=p.device), torch.ones(1, p.F, device=p.device)

    def scaled(x: Tensor, W: Tensor, *scales: Tensor) -> Tensor:
        return torch._scaled_mm(x, W.t(), *scales, out_dtype=torch.bfloat16)

    return scaled, (x, W, *scales)


def product_row(p: Problem, precision: str, budget: float = 100, space=True) -> dict[str, Any]:
    with tf32_products(precision == "tf32"):
        run, inputs = product(p, precision)
        row = measure(run, [inputs], p.device, budget, space=space, dry=p.dry)
    return row | {"TFLOP/s": digits(2 * p.N * p.D * p.F / row["ms"]["median"] / 1e9)}


def linear_row(p: Problem) -> dict[str, Any]:
    """The same with bias: far slower than the product where no fused epilogue is found."""
    inputs = p.normal(p.N, p.D), p.normal(p.F, p.D), p.normal(p.F)
    row = measure(linear, [inputs], p.device, 60, dry=p.dry)
    return row | {"TFLOP/s": digits(2 * p.N * p.D * p.F / row["ms"]["median"] / 1e9)}


def copy_row(p: Problem, budget: float = 200.0, space: bool = True) -> dict[str, Any]:
    """A copy within the device: of 4 GB on a GPU, of 256 MB on a CPU."""
    size = 1 << (20 if p.dry else 30 if p.device.type == "cuda" else 26)
    source = p.normal(size, dtype=torch.float32)
    target = torch.empty_like(source)
    copy = measure(lambda: target.copy_(source), [()], p.device, budget, space=space, dry=p.dry)
    return copy | {"GB/s": digits(2 * source.nbytes / copy["ms"]["median"] / 1e6)}


def square(p: Problem) -> Problem:
    """The product whose rate is the roof."""
    side = 64 if p.dry else 8192 if p.device.type == "cuda" else 2048
    return p._replace(name="square", N=side, D=side, F=side)


def roofs_from(rows: dict[str, dict[str, Any]]) -> Roofs:
    """From the rows "copy" and "bf16 square", or those that were held for 2 s, as a step is."""
    found = {name: row for name, row in rows.items() if "ms" in row}
    rates = {}
    for precision in PRECISIONS:
        row = found.get(f"{precision} square", {})
        rates[precision] = row.get("TFLOP/s", math.nan) * 1e12
    return Roofs(found.get("copy", {}).get("GB/s", math.nan) * 1e9, rates)


def measure_roofs(p: Problem, rates: set[str]) -> Roofs:
    """The roofs that some costs need."""
    rows = {"copy": copy_row(p)}
    rows |= {f"{rate} square": product_row(square(p), rate) for rate in sorted(rates)}
    return roofs_from(rows)
