"""Simulates training on many GPUs: no run on more than one GPU has been timed yet.

A step on a mesh of (data, latent) takes the time of its kernels on one GPU's share of the work,
plus the time of the bytes that the GPU receives from others. Nothing overlaps. The bytes are a
formula, which tests/distributed/test_bytes.py compares with what a real step receives; the rates of
the network are assumptions. Kernel times are those that fastsae/estimate predicts from
bytes and FLOPs, without the limits of occupancy; where bench/results has a step that was measured
on a GPU (`python -m bench gpu`), they are scaled by measured / predicted.

columns: kernel time; bytes received within the node and from other nodes; step time; efficiency
(time of one GPU / number of GPUs / step time, at the same batch); weights and optimizer state per
GPU, with Adam's moments in fp32 and in bf16.

`--measure` trains at shape d with 1, 2 and 4 processes on this CPU and reports the memory of each:
bench/sharded_memory.py. Results go to bench/results/scaling.json.
"""

import argparse
import json
from typing import Any

from fastsae.distributed import Axes
from fastsae.estimate.exchange import LATENCY, NIC, NODE, NVLINK, network_seconds, received, widest
from fastsae.estimate.gpu_step import kernel_seconds

from . import record
from .clock import significant
from .problem import SHAPES, Size
from .sharded_memory import measure

ASSUMED = [
    "This is a simulation, not a measurement.",
    f"{NODE} GPUs per node, ranks along the latent axis first; a GPU receives "
    f"{NVLINK / 1e9:.0f} GB/s from its node and then {NIC / 1e9:.0f} GB/s from other nodes.",
    "Everything is sent directly from GPU to GPU: what all 8 GPUs of a node need crosses the "
    f"network 8 times. Each collective takes a further {LATENCY * 1e6:.0f} us.",
    "Nothing overlaps, and no GPU waits for another one, for the host or for data.",
    "Active latents are spread evenly over GPUs; the widest token has as many on a GPU as the "
    "binomial distribution lets one of N have.",
    "No latent is dead. Encoder in bf16, or with fp8 candidates where that is faster; Adam with "
    "bf16 moments and window 8, as in docs/kernels.md.",
]

LARGEST: Size = (4096, 12288, 1 << 24, 128)
MESHES = {8: [(8, 1), (1, 8)], 16: [(1, 16), (2, 8)], 64: [(1, 64), (2, 32), (8, 8)]}
SIMULATED: dict[str, tuple[Size, dict[int, list[tuple[int, int]]]]] = {
    "A": (SHAPES["A"], MESHES),
    "D": (SHAPES["D"], MESHES),
    "16 M": (LARGEST, {64: [(1, 64)]}),
}


# --- the simulation -------------------------------------------------------------------------


def predicted_ms(size: Size, axes: Axes) -> dict[str, float]:
    """Time of a GPU's kernels in a step, with each encoder."""
    encoders = {"bf16": False, "fp8": True}
    return {n: 1e3 * sum(kernel_seconds(size, axes, fp8).values()) for n, fp8 in encoders.items()}


MEASURED = {"bf16": "fastsae, bf16 moments, window 8", "fp8": "fastsae, fp8 candidates"}
"""The contenders of bench/gpu/step.py whose step is predicted."""


def measured_ms(shape: str) -> dict[str, float]:
    """The step's time on one GPU with each encoder, as far as `python -m bench gpu` measured it."""
    rows = {}
    for path in sorted(record.RESULTS.glob("gpu-*.json")):
        rows |= json.loads(path.read_text()).get("step", {}).get("rows", {})
    found = {encoder: rows.get(f"{shape} {name}", {}) for encoder, name in MEASURED.items()}
    return {key: row["ms"]["median"] for key, row in found.items() if "ms" in row}


def simulate(name: str, axes: Axes) -> dict[str, Any]:
    """A row of the table. The largest SAE takes its measured time, if any, from shape D."""
    size, shape = SIMULATED[name][0], name if name in SHAPES else "D"
    one, here, real = predicted_ms(size, Axes()), predicted_ms(size, axes), measured_ms(shape)
    if real:  # with measured times, only encoders that were measured
        scale = {key: real[key] / predicted_ms(SHAPES[shape], Axes())[key] for key in real}
        one, here = ({key: ms[key] * scale[key] for key in real} for ms in (one, here))
    (N, d, F, k), encoder = size, min(here, key=lambda key: here[key])
    moves = received(size, axes, width=widest(N, k, axes.latent))
    network, near, far = network_seconds(moves, axes)
    step = here[encoder] + 1e3 * network
    weights = 2 * F * d / axes.latent / 1e9
    row = {
        "kernel times": "scaled to a measurement" if real else "predicted", "encoder": encoder,
        "kernel ms": here[encoder], "MB from the node": near / 1e6,
        "MB from other nodes": far / 1e6, "step ms": step,
        "efficiency": min(one.values()) / axes.size / step, "tokens/s": round(1e3 * N / step),
        "state GB": weights * 14, "state GB, bf16 moments": weights * 10,
    }  # fmt: skip
    return {key: significant(x) if isinstance(x, float) else x for key, x in row.items()}


# --- the command ----------------------------------------------------------------------------


def table() -> dict[str, Any]:
    """Print the simulation."""
    rows = {
        f"{name}, {gpus} GPUs, {axes}": simulate(name, axes)
        for name, (_, meshes) in SIMULATED.items()
        for gpus, pairs in meshes.items()
        for axes in (Axes(*pair) for pair in pairs)
    }
    print(*ASSUMED, sep="\n")
    titles = [*next(iter(rows.values()))]
    print(record.markdown(["simulated", *titles], [(n, *row.values()) for n, row in rows.items()]))
    return {"assumptions": ASSUMED, "rows": rows}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    text = "measure the memory of processes on this CPU instead (6 GB, a few minutes)"
    parser.add_argument("--measure", action="store_true", help=text)


def bench(arguments: argparse.Namespace) -> None:
    """Print a table, and write it to the results."""
    found = {"memory": measure()} if arguments.measure else {"simulation": table()}
    print(record.write("scaling", found))
