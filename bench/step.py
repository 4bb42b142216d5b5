"""Times full training steps on the CPU against dense PyTorch and the machine's floor.

The floor is what no step with an fp32 GEMM can avoid: that of the encoder, by the faster of torch's
libraries, and Adam reading and writing each parameter and its two moments once (24 bytes), at the
bandwidth of a copy. On CPUs with bfloat16 instructions, fastsae can be below it: it finds the same
active latents with a bfloat16 GEMM. All contenders take turns. The table shows milliseconds,
multiples of the floor, and peak memory including imports. Shapes are in bench/problem.py.

Results go to bench/results/step-intel.json, or that of another machine. The line printed before
that is this processor's entry for CPU_PRODUCTS in kernels/fastsae_kernels/product.py: the GEMM
whose fp32 steps are fastest.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from fastsae.memory import keep_freed_memory
from fastsae_kernels import product as chosen
from fastsae_kernels import proof
from fastsae_kernels.product import LIBRARIES, CpuProduct, cpu_product, processor, product

from .clock import interleaved, resident_bytes, summary
from .contender import LOW, Contender, random_sae, step_of
from .problem import SHAPES, Problem
from .record import machine, write

CONTENDERS = {"fastsae": Contender()}
CONTENDERS |= {f"fastsae {low}": Contender(options={"encoder_precision": low}) for low in LOW}
CONTENDERS["dense"] = Contender("dense")

PRODUCTS = {f"{name}:{n}": CpuProduct(name, n) for name in LIBRARIES for n in (256, 1024)}


def run_of(shape: str, name: str):
    """A step of a contender at a shape, on its own copy of the weights."""
    p = Problem(shape, *SHAPES[shape], torch.device("cpu"), torch.float32)
    torch.manual_seed(0)
    return partial(step_of(CONTENDERS[name], p, random_sae(p)), p.normal(p.N, p.D))


def with_product(name: str, step: Callable[[], object]) -> None:
    """Take a step with this fp32 GEMM."""
    with patch.object(chosen, "CPU_PRODUCT", name), patch.object(proof, "CPU_BF16", "0"):
        cpu_product.cache_clear()
        try:
            step()
        finally:
            cpu_product.cache_clear()


def floor(shape: str) -> dict[str, Any]:
    """The parts of the floor: Adam's memory traffic, and the encoder GEMM of each library."""
    N, d_in, d_sae, _ = SHAPES[shape]
    x, W, bias = torch.randn(N, d_in), torch.randn(d_sae, d_in), torch.zeros(d_sae)
    copy, state = torch.randn(2, 6, d_sae, d_in)  # both matrices with two moments each
    return {"Adam's bytes": lambda: copy.copy_(state)} | {
        name: lambda one=one: [product(t, W, bias, one.library) for t in x.split(one.tokens)]
        for name, one in PRODUCTS.items()
    }


def measure(shape: str, rounds: int) -> dict[str, Any]:
    """Times of all contenders and of the floor at a shape, and peak memory of each contender."""
    runs = floor(shape) | {name: run_of(shape, name) for name in CONTENDERS}
    step = runs["fastsae"]
    runs |= {f"fastsae, {name}": partial(with_product, name, step) for name in PRODUCTS}
    times = interleaved(runs, rounds)
    result: dict[str, Any] = {"unit": "ms", "rounds": rounds, "product": str(cpu_product())}
    result |= {name: summary(values) for name, values in times.items()}
    medians = {name: result[name]["median"] for name in runs}
    least = min(medians[name] for name in PRODUCTS) + medians["Adam's bytes"]
    result["floor"] = {"median": round(least, 2)}
    for name in CONTENDERS:  # in its own process, to measure its memory
        result[name]["of floor"] = round(result[name]["median"] / least, 3)
        command = [sys.executable, "-m", "bench.step", shape, name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        result[name]["peak MB"] = round(float(output))
    return result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, shapes = parser.add_argument, list("abcd")
    add("--shapes", nargs="+", choices=shapes, default=shapes, help="shapes to time (default: all)")
    add("--rounds", type=int, default=7, help="rounds in which contenders take turns (default: 7)")


def bench(arguments: argparse.Namespace) -> None:
    """Measure every shape, print a row for each, and write the results."""
    keep_freed_memory()  # as the trainer does; it helps dense PyTorch as well
    results = {}
    print("milliseconds and multiples of the floor")
    print(f"{'shape':<15}", *(f"{name:>12}{'':>8}" for name in CONTENDERS), "   peak MB", sep=" ")
    for shape in arguments.shapes:
        r = results[shape] = measure(shape, arguments.rounds)
        cells = "".join(f"{r[w]['median']:>14.1f}{r[w]['of floor']:>7.2f}x" for w in CONTENDERS)
        peaks = " / ".join(str(r[w]["peak MB"]) for w in CONTENDERS)
        print(f"{shape:<6}{r['floor']['median']:>9.1f}{cells}   {peaks}", flush=True)
    rows = results.values()
    best = min(PRODUCTS, key=lambda name: sum(r[f"fastsae, {name}"]["median"] for r in rows))
    print(f"{processor()}: {PRODUCTS[best]}")
    print(write(f"step-{machine()}", results))


if __name__ == "__main__":
    keep_freed_memory()
    run = run_of(*sys.argv[1:])
    for _ in range(3):
        run()
    print(resident_bytes() / 2**20)
