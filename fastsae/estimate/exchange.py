"""What a process of a mesh receives from the others in a step, and how long that takes.

The bytes are a formula, which tests/distributed/test_bytes.py compares with what a real step
receives. The rates of the network are assumptions.
"""

import math
from typing import NamedTuple

from fastsae.distributed import Axes

NODE, NVLINK, NIC, LATENCY = 8, 450e9, 50e9, 20e-6
"""Assumed: GPUs per node, bytes per second that a GPU receives from its node and from other nodes,
and seconds of each collective. Ranks follow the latent axis first."""

Size = tuple[int, int, int, int]
"""tokens, d_in, d_sae, k"""


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


def network_seconds(moves: list[Received], axes: Axes) -> tuple[float, float, float]:
    """Time of the moves on assumed rates, and their bytes within the node and from others."""
    inner = {"latent": min(axes.latent, NODE), "data": min(axes.data, max(NODE // axes.latent, 1))}
    inner["all"], near = min(axes.size, NODE), 0.0
    for move in moves:
        peers = {"data": axes.data, "latent": axes.latent, "all": axes.size}[move.axis] - 1
        near += move.bytes * (inner[move.axis] - 1) / peers
    far = sum(move.bytes for move in moves) - near
    return near / NVLINK + far / NIC + LATENCY * len(moves), near, far


def widest(N: int, k: int, L: int) -> int:
    """The count that one of N tokens exceeds, of k latents each of which is on one of L GPUs."""
    share = [math.comb(k, j) * (L - 1) ** (k - j) / L**k for j in range(k + 1)]
    return next(j for j in range(k + 1) if N * sum(share[j + 1 :]) < 1)
