"""One whole training step against dense PyTorch and two floors of the machine, on a CPU.

A floor is what no step can avoid: the encoder's GEMM in fp32, and Adam reading and writing each
parameter and its two moments once (24 bytes), at the speed this machine copies memory. The first
takes torch.mm for the GEMM, as PyTorch users get it (MKL on x86); the second the faster of that
and oneDNN's, which fastsae uses.
"""

import argparse
import subprocess
import sys
from functools import partial
from typing import Any

import torch

from fastsae.train.memory import keep_freed_memory
from fastsae_kernels.encode import _product

from .clock import interleaved, resident_bytes, summary
from .contender import Contender, empty_sae, step_of
from .problem import SHAPES, Problem
from .record import write

CONTENDERS = {
    "fastsae": Contender(),
    "fastsae bf16": Contender(options={"encoder_precision": "bf16"}),
    "dense": Contender("dense"),
}


def run_of(shape: str, name: str):
    """What is timed of a contender at a shape, on weights of its own."""
    p = Problem(shape, *SHAPES[shape], torch.device("cpu"), torch.float32)
    torch.manual_seed(0)
    x = p.normal(p.N, p.D)
    return partial(step_of(CONTENDERS[name], p, empty_sae(p)), x)


def floor(shape: str) -> dict[str, Any]:
    """The parts of the floors."""
    N, d_in, d_sae, _ = SHAPES[shape]
    x, W, out = torch.randn(N, d_in), torch.randn(d_sae, d_in), torch.empty(N, d_sae)
    state = torch.randn(6, d_sae, d_in)  # both matrices with two moments each
    copy, bias = torch.empty_like(state), torch.zeros(d_sae)
    return {
        "torch.mm": lambda: torch.mm(x, W.t(), out=out),
        "oneDNN": lambda: [_product(rows, W, bias) for rows in x.split(256)],
        "Adam's bytes": lambda: copy.copy_(state),
    }


def measure(shape: str, rounds: int) -> dict[str, Any]:
    runs = floor(shape) | {name: run_of(shape, name) for name in CONTENDERS}
    times = interleaved(runs, rounds)
    result: dict[str, Any] = {"unit": "ms", "rounds": rounds}
    result |= {name: summary(values) for name, values in times.items()}
    products = [result[name]["median"] for name in ("torch.mm", "oneDNN")]
    for floor_name, product in {"floor": products[0], "best floor": min(products)}.items():
        least = product + result["Adam's bytes"]["median"]
        result[floor_name] = {"median": round(least, 2)}
        for name in CONTENDERS:
            result[name][f"of {floor_name}"] = round(result[name]["median"] / least, 3)
    for name in CONTENDERS:  # alone in a process, for its memory
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
    print("ms, and multiples of the first floor: with torch.mm, with the faster of it and oneDNN")
    names = "".join(f"{name:>14}{'':>8}" for name in CONTENDERS)
    print(f"{'shape':<6}{'floors':>18}{names}   peak MB")
    for shape in arguments.shapes:
        r = results[shape] = measure(shape, arguments.rounds)
        cells = "".join(f"{r[w]['median']:>14.1f}{r[w]['of floor']:>7.2f}x" for w in CONTENDERS)
        peaks = " / ".join(str(r[w]["peak MB"]) for w in CONTENDERS)
        floors = "".join(f"{r[name]['median']:>9.1f}" for name in ("floor", "best floor"))
        print(f"{shape:<6}{floors}{cells}   {peaks}", flush=True)
    print(write("step-cpu", results))


if __name__ == "__main__":
    shape, name = sys.argv[1:]
    keep_freed_memory()
    run = run_of(shape, name)
    for _ in range(3):
        run()
    print(resident_bytes() / 2**20)
