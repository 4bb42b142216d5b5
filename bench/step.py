"""One whole training step against dense PyTorch and the machine's floor, on a CPU.

The floor is what no step in fp32 can avoid: the encoder's GEMM, by the faster of the libraries that
torch has, and Adam reading and writing each parameter and its two moments once (24 bytes), at the
speed this machine copies memory. The last line that is printed belongs into CPU_PRODUCTS of
kernels/fastsae_kernels/product.py.
"""

import argparse
import subprocess
import sys
from functools import partial
from typing import Any

import torch

from fastsae.train.memory import keep_freed_memory
from fastsae_kernels.product import LIBRARIES, CpuProduct, cpu_product, processor, product

from .clock import interleaved, resident_bytes, summary
from .contender import LOW, Contender, empty_sae, step_of
from .problem import SHAPES, Problem
from .record import machine, write

CONTENDERS = {"fastsae": Contender()}
CONTENDERS |= {f"fastsae {low}": Contender(options={"encoder_precision": low}) for low in LOW}
CONTENDERS["dense"] = Contender("dense")

PRODUCTS = {f"{name}:{n}": CpuProduct(name, n) for name in LIBRARIES for n in (256, 1024)}


def run_of(shape: str, name: str):
    """What is timed of a contender at a shape, on weights of its own."""
    p = Problem(shape, *SHAPES[shape], torch.device("cpu"), torch.float32)
    torch.manual_seed(0)
    return partial(step_of(CONTENDERS[name], p, empty_sae(p)), p.normal(p.N, p.D))


def floor(shape: str) -> dict[str, Any]:
    """The parts of the floors."""
    N, d_in, d_sae, _ = SHAPES[shape]
    x, W, bias = torch.randn(N, d_in), torch.randn(d_sae, d_in), torch.zeros(d_sae)
    copy, state = torch.randn(2, 6, d_sae, d_in)  # both matrices with two moments each
    return {"Adam's bytes": lambda: copy.copy_(state)} | {
        name: lambda one=one: [product(t, W, bias, one.library) for t in x.split(one.tokens)]
        for name, one in PRODUCTS.items()
    }


def measure(shape: str, rounds: int) -> dict[str, Any]:
    runs = floor(shape) | {name: run_of(shape, name) for name in CONTENDERS}
    times = interleaved(runs, rounds)
    result: dict[str, Any] = {"unit": "ms", "rounds": rounds, "product": str(cpu_product())}
    result |= {name: summary(values) for name, values in times.items()}
    medians = {name: result[name]["median"] for name in runs}
    least = min(medians[name] for name in PRODUCTS) + medians["Adam's bytes"]
    result["floor"] = {"median": round(least, 2)}
    for name in CONTENDERS:  # alone in a process, for its memory
        result[name]["of floor"] = round(result[name]["median"] / least, 3)
        command = [sys.executable, "-m", "bench.step", shape, name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        result[name]["peak MB"] = round(float(output))
    return result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", nargs="+", choices=list("abcd"), default=list("abcd"))
    parser.add_argument("--rounds", type=int, default=7)


def bench(arguments: argparse.Namespace) -> None:
    keep_freed_memory()  # as the trainer does; it helps dense PyTorch as well
    results = {}
    print("milliseconds, and multiples of the floor")
    print(f"{'shape':<15}", *(f"{name:>12}{'':>8}" for name in CONTENDERS), "   peak MB", sep=" ")
    for shape in arguments.shapes:
        r = results[shape] = measure(shape, arguments.rounds)
        cells = "".join(f"{r[w]['median']:>14.1f}{r[w]['of floor']:>7.2f}x" for w in CONTENDERS)
        peaks = " / ".join(str(r[w]["peak MB"]) for w in CONTENDERS)
        print(f"{shape:<6}{r['floor']['median']:>9.1f}{cells}   {peaks}", flush=True)
    best = min(PRODUCTS, key=lambda name: sum(r[name]["median"] for r in results.values()))
    print(f"{processor()}: {PRODUCTS[best]}")
    print(write(f"step-{machine()}", results))


if __name__ == "__main__":
    keep_freed_memory()
    run = run_of(*sys.argv[1:])
    for _ in range(3):
        run()
    print(resident_bytes() / 2**20)
