"""The bytes that a process receives in a step are those that `python -m bench scaling` counts."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from fastsae import SAE, TopK
from fastsae.distributed import Axes, Mesh, collectives, mesh, parallelize
from fastsae.estimate.exchange import received
from fastsae.losses import Objective
from fastsae.train.optim import Adam, Optimizer
from fastsae.train.step import fused_step

SIZE = 128, 12, 192, 5
K_AUX = 3
BOTH = "W_enc", "W_dec"

Move = tuple[str, int]
"""The axis, and what a process receives along it from others."""


@contextmanager
def recorded(shards: Mesh) -> Iterator[tuple[list[Move], list[int]]]:
    """What this process receives from others, and how wide the codes are that it does."""
    moves, widths = list[Move](), list[int]()
    names = {shards.along_latent: "latent", shards.along_data: "data", shards.everyone: "all"}

    def counted(run: Any, found: Tensor, own: Tensor, group: Any) -> None:
        R = group.size()
        moves.append((names[group], found.nbytes // R * (R - 1)))
        run(found, own, group=group)

    def widest(x: Tensor, group: Any) -> int:
        widths.append(found := mesh_widest(x, group))
        return found

    mesh_widest = mesh.widest
    gather, exchange = collectives._all_gather, dist.all_to_all_single
    with (
        patch.object(collectives, "_all_gather", partial(counted, gather)),
        patch.object(dist, "all_to_all_single", partial(counted, exchange)),
        patch.object(mesh, "widest", widest),
    ):
        yield moves, widths


def step(shards: Mesh, low: bool, dead: tuple[int, ...]) -> tuple[list[Move], list[Move]]:
    """A process's part of a step: what it received, and what it should have. The places on the
    latent axis take turns in having as many dead latents; with none, no latent is dead."""
    N, d, F, k = SIZE
    torch.manual_seed(0)
    sae = parallelize(SAE(d, F, TopK(k)), shards)
    adam = Adam(sae, Optimizer(), shadows=BOTH if low else ())
    adam.begin_step(1e-3)
    x, rows = torch.randn(N, d), shards.rows(F)
    counts = [dead[place % len(dead)] for place in range(shards.latent)] if dead else []
    own = torch.arange(counts[shards.latent_rank]) if dead else None
    n = N // shards.size
    with recorded(shards) as (moves, widths):
        assert shards.control.largest(0) == 0
        batch = shards.gather_tokens(x[shards.rank * n :][:n].contiguous())
        fused_step(sae, adam, batch, own, Objective(k_aux=K_AUX))
    assert len(sae.W_enc) == rows.stop - rows.start
    assert len(widths) == (shards.data > 1), "all entries are as wide"
    expected = received(
        SIZE,
        shards.axes,
        weights=2 if low else 4,
        width=widths[0] if widths else None,
        dead=tuple(counts),
        k_aux=K_AUX,
    )
    return moves, [(move.axis, move.bytes) for move in expected]


@pytest.mark.parametrize("dead", [(), (1, 2, 0)], ids=str)
@pytest.mark.parametrize("axes", [(1, 2), (2, 1), (1, 4), (2, 2)], ids=str)
def test_the_bytes_of_a_step(processes, axes, dead):
    for moves, expected in processes.run(axes, step, bool(dead), dead):
        assert moves == expected


def step_of_one(alone: Mesh, axes: tuple[int, int], rank: int, *arguments: Any) -> Any:
    """The same as one process of a mesh whose others do not exist: it receives nothing from them
    but bytes."""
    dist.destroy_process_group()
    size = axes[0] * axes[1]
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    new_group = dist.new_group
    with patch.object(dist, "new_group", lambda ranks=None, **_: new_group(ranks)):
        return step(Mesh(Axes(*axes)), *arguments)


@pytest.mark.parametrize("dead", [(), (2,)], ids=str)
@pytest.mark.parametrize("axes", [(8, 8), (1, 64)], ids=str)
def test_the_bytes_of_a_step_of_64_processes(processes, axes, dead):
    ((moves, expected),) = processes.run((1, 1), step_of_one, axes, 37, True, dead)
    assert moves == expected
