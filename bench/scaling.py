"""Simulates training on many GPUs: no run on more than one GPU has been timed yet.

A step on a mesh of (data, latent) takes the time of its kernels on one GPU's share of the work,
plus the time of the bytes that the GPU receives from others. Nothing overlaps. The bytes are a
formula, which tests/distributed/test_bytes.py compares with what a real step receives; the rates of
the network are assumptions. Kernel times are those that tests/compile/predict.py predicts from
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
import math
import sys
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

from fastsae.distributed import Axes

from . import record
from .clock import significant
from .problem import SHAPES, Size
from .sharded_memory import measure

NODE, NVLINK, NIC, LATENCY = 8, 450e9, 50e9, 20e-6
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


class Received(NamedTuple):
    """What a process receives in one collective of a step, not counting its own part."""

    what: str
    axis: str
    """data, latent, or all for both."""
    bytes: int


def received(
    size: Size,
    axes: Axes,
    *,
    x: int = 4,
    weights: int = 2,
    width: int | None = None,
    dead: tuple[int, ...] = (),
    k_aux: int | None = None,
) -> list[Received]:
    """What each process receives in a fused TopK step, in order.

    Args:
        size: N tokens of all processes, d_in, F latents and k; N divisible by the processes, F by
            the latent axis.
        x: bytes of an activation as it is loaded.
        weights: bytes of a weight that GEMMs read, 2 on a GPU, 4 on a CPU.
        width: most active latents of any token on one process (default: all k).
        dead: dead latents of each place on the latent axis, empty before any is; the aux loss is
            then taken, in one chunk of tokens.
        k_aux: as in `Objective`.
    """
    (N, d, F, k), D, L = size, axes.data, axes.latent
    n, own, wide = N // axes.size, min(k, F // L), max(weights, 4)
    width, found = width or own, list[Received]()

    def add(what: str, bytes: int, axis: str = "latent") -> None:
        """Everyone on the axis sends this process as many bytes."""
        peers = {"data": D, "latent": L, "all": D * L}[axis] - 1
        if peers:
            found.append(Received(what, axis, peers * bytes))

    def tokens(what: str, item: int) -> None:
        """A gather of all tokens, first along data."""
        add(what, n * item, "data")
        add(what, D * n * item)

    def total(what: str, count: int, item: int) -> None:
        """A sum over the latent axis: the parts of this process's share, then others' shares."""
        for part in ("parts", "sums"):
            add(f"{what}, {part}", -(-count // L) * item)

    def selection(what: str, rows: int, count: int) -> None:
        add(f"{what}, values", -(-rows // L) * count * weights)
        add(f"{what}, counts", -(-rows // L) * 4)

    add("signals", 8, "all")
    tokens("activations", d * x)
    selection("selection", N // D, own)
    add("partial reconstructions", n * d * wide)
    tokens("squared errors", wide)
    add("errors of these tokens", n * d * wide)
    if D > 1:
        tokens("errors of all tokens", d * weights)
    add("most active latents", 8, "data")
    for what, item in {"values": weights, "indices": 8, "dot products": wide}.items():
        add(what, N // D * width * item, "data")
    if dead:
        most, k_aux = max(dead), k_aux or d // 2
        for what in ("of dead latents", "of dead latents", "of tokens at a time"):
            add(f"counts {what}", 8)
        if k_aux < sum(dead):
            selection("selection of dead latents", N, min(k_aux, most))
        total("reconstructions by dead latents", N * d, weights)
        total("gradient of b_dec by dead latents", d, x)
    total("gradient of b_dec", d, wide)
    total("L0", 1, 4)
    return found


# --- the simulation -------------------------------------------------------------------------


def seconds(moves: list[Received], axes: Axes) -> tuple[float, float, float]:
    """Time of the moves, and their bytes within the node and from others."""
    inner = {"latent": min(axes.latent, NODE), "data": min(axes.data, max(NODE // axes.latent, 1))}
    inner["all"], near = min(axes.size, NODE), 0.0
    for move in moves:
        peers = {"data": axes.data, "latent": axes.latent, "all": axes.size}[move.axis] - 1
        near += move.bytes * (inner[move.axis] - 1) / peers
    far = sum(move.bytes for move in moves) - near
    return near / NVLINK + far / NIC + LATENCY * len(moves), near, far


@cache
def predictions() -> Any:
    """tests/compile/predict.py, which needs triton."""
    sys.path.append(str(record.ROOT / "tests" / "compile"))
    return import_module("predict")


def predicted_ms(size: Size, axes: Axes) -> dict[str, float]:
    """Time of a GPU's kernels in a step, with each encoder."""
    p = predictions()
    (N, d, F, k), L = size, axes.latent
    M, rows, few = N // axes.data, F // L, max(k // L, 1)
    found = {}
    for name, rate in {"bf16": p.BF16, "fp8": p.FP8}.items():

        def seconds(kernel: str, tokens: int, K: int, fp8: bool = name == "fp8") -> float:
            work = {one.kernel: one for one in p.step_work(tokens, d, rows, K, fp8)}
            return work[kernel].seconds(math.inf)  # however few of its CTAs run at a time

        # Along data, every GPU encodes a part of the tokens, and updates its rows from all.
        time = 2 * M * rows * d / rate + seconds("_topk_kernel", M, few) + p.SMALL
        time += seconds("_center_kernel", N, few) + seconds("_adam_kernel", N, few)
        if name == "fp8":  # every GPU ranks as many candidates of its own as one GPU would
            time += seconds("_quantize_kernel", M, few)
            time += seconds("_rescore_kernel", M, min(k, rows))
        # Along latent, decoding and dot products are two passes, with a sum of parts in between.
        time += seconds("_squared_error_kernel", M, few) * (1 + (L > 1))
        found[name] = 1e3 * (time + 12 * M * d / p.MEMORY * (L > 1))
    return found


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
    network, near, far = seconds(moves, axes)
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


def widest(N: int, k: int, L: int) -> int:
    """The count that one of N tokens exceeds, of k latents each of which is on one of L GPUs."""
    share = [math.comb(k, j) * (L - 1) ** (k - j) / L**k for j in range(k + 1)]
    return next(j for j in range(k + 1) if N * sum(share[j + 1 :]) < 1)


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
