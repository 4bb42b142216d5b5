"""One whole training step against dense PyTorch and two floors of the machine.

A floor is what no step can avoid: the encoder's product in fp32, and Adam reading and writing each
parameter and its two moments once (24 bytes), at the speed this machine copies memory. The first
takes torch.mm for the product, as PyTorch users get it (MKL on x86); the second the faster of that
and oneDNN's, which fastsae uses.
"""

import subprocess
import sys
from typing import Any

import torch

from fastsae import SAE, TopK
from fastsae.losses import Objective
from fastsae.train.memory import keep_freed_memory
from fastsae.train.optim import Adam
from fastsae.train.step import fused_step
from fastsae_kernels.encode import _product

from .common import SHAPES, interleaved, peak_megabytes, summary, write
from .dense import DenseTopK, dense_adam, dense_step

WAYS = ("fastsae", "fastsae bf16", "dense")


def fastsae_run(sae: SAE, x: torch.Tensor, shadows: tuple[str, ...] = ()):
    adam = Adam(sae, shadows=shadows)

    def run() -> None:
        adam.begin_step(1e-4)
        fused_step(sae, adam, x, None, Objective())

    return run


def runs(shape: str, ways: tuple[str, ...]) -> dict[str, Any]:
    """What is timed at a shape, by name, each on weights of its own."""
    N, d_in, d_sae, k = SHAPES[shape]
    torch.manual_seed(0)
    x = torch.randn(N, d_in)

    def tied() -> SAE:
        sae = SAE(d_in, d_sae, TopK(k))
        sae.W_enc.data.copy_(sae.W_dec.data)
        return sae

    made: dict[str, Any] = {}
    if "fastsae" in ways:
        made["fastsae"] = fastsae_run(tied(), x)
    if "fastsae bf16" in ways:
        made["fastsae bf16"] = fastsae_run(tied(), x, ("W_enc",))
    if "dense" in ways:
        model = DenseTopK(tied())
        adam = dense_adam(model, 1e-4)
        dead = torch.zeros(d_sae, dtype=torch.bool)
        made["dense"] = lambda: dense_step(model, adam, x, dead, d_in // 2)
    return made


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
    times = interleaved({**floor(shape), **runs(shape, WAYS)}, rounds)
    result: dict[str, Any] = {"unit": "ms", "rounds": rounds}
    result |= {name: summary(values) for name, values in times.items()}
    products = [result[name]["median"] for name in ("torch.mm", "oneDNN")]
    for floor_name, product in {"floor": products[0], "best floor": min(products)}.items():
        least = product + result["Adam's bytes"]["median"]
        result[floor_name] = {"median": round(least, 2)}
        for name in WAYS:
            result[name][f"of {floor_name}"] = round(result[name]["median"] / least, 3)
    for name in WAYS:  # alone in a process, for its memory
        command = [sys.executable, "-m", "bench.step", shape, name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        result[name]["peak MB"] = round(float(output))
    return result


def bench(shapes: list[str], rounds: int) -> None:
    keep_freed_memory()  # as the trainer does; it helps dense PyTorch as well
    results = {}
    print("ms, and multiples of the first floor: with torch.mm, with the faster of it and oneDNN")
    names = "".join(f"{name:>14}{'':>8}" for name in WAYS)
    print(f"{'shape':<6}{'floors':>18}{names}   peak MB")
    for shape in shapes:
        r = results[shape] = measure(shape, rounds)
        cells = "".join(f"{r[w]['median']:>14.1f}{r[w]['of floor']:>7.2f}x" for w in WAYS)
        peaks = " / ".join(str(r[w]["peak MB"]) for w in WAYS)
        floors = "".join(f"{r[name]['median']:>9.1f}" for name in ("floor", "best floor"))
        print(f"{shape:<6}{floors}{cells}   {peaks}", flush=True)
    print(write("step-cpu", results))


if __name__ == "__main__":
    shape, way = sys.argv[1:]
    keep_freed_memory()
    (run,) = runs(shape, (way,)).values()
    for _ in range(3):
        run()
    print(peak_megabytes())
