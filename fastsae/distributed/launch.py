"""The processes that torchrun has started, as a mesh, and what they say when one of them fails."""

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from fastsae.device import choose_device
from fastsae.shards import ONE_PROCESS, Shards

from .mesh import Axes, Mesh

TIMEOUT = timedelta(seconds=300)
"""How long a process waits for the others before it fails. One that ends is noticed at once."""

LOST = "Connection closed|Connection reset|Broken pipe|[Tt]imed out|NCCL|gloo|Socket"
"""How the libraries' RuntimeErrors say that another process is gone."""

ARRIVED = "arrived/0"
"""Set once process 0 has joined the others or failed before that."""

_kept: list[Store] = []
"""Stores that other processes may still read while this one ends: process 0 serves its own."""


class LostError(OSError):
    """Another process of the mesh has ended."""


class Place(NamedTuple):
    """This process among those that torchrun has started."""

    rank: int
    size: int
    local_rank: int
    """Its number on this machine."""
    local_size: int
    """Processes on this machine."""


def place() -> Place:
    """Alone, where no launcher has set the environment."""
    names = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"
    rank, size, local_rank, local_size = (os.environ.get(name) for name in names)
    if rank is None or size is None:
        return Place(0, 1, 0, 1)
    return Place(int(rank), int(size), int(local_rank or 0), int(local_size or size))


def named_axes(mesh: str) -> Axes:
    """The axes that `mesh` names, such as data=2,latent=8; ValueError if it does not."""
    parts = [part.partition("=") for part in mesh.split(",")]
    sizes = {name: int(size) for name, _, size in parts if size.isdecimal()}
    if len(sizes) != len(parts) or not sizes.keys() <= {"data", "latent"}:
        raise ValueError(f"mesh must be like data=1,latent=8, got {mesh!r}")
    return Axes(**sizes)


def axes_of(mesh: str | None, own: Place, several: bool = False) -> Axes:
    """The axes that `mesh` names, such as data=2,latent=8. By default the processes of a machine
    divide the latents, and machines the tokens. ValueError unless they fit the processes, which may
    make several such meshes if that is asked for."""
    if mesh is None:
        return Axes(own.size // own.local_size, own.local_size)
    axes = named_axes(mesh)
    if own.size % axes.size if several else own.size != axes.size:
        started = f"there are {own.size}" if own.size > 1 else "there is one"
        taken = f"a multiple of {axes.size}" if several else axes.size
        raise ValueError(
            f"a mesh of {axes} takes {taken} processes, but {started}: start them with "
            f"torchrun --nproc-per-node {axes.size} -m fastsae ..."
        )
    return axes


def device_of(device: str, own: Place) -> str:
    """The kind of device asked for; of several GPUs, the current one is then that of this process's
    number on its machine."""
    if device.startswith("cuda:"):
        raise ValueError(f"many processes choose their GPUs by number: give cuda, not {device}")
    chosen = choose_device(device)
    if chosen == "cuda":
        torch.cuda.set_device(own.local_rank % torch.cuda.device_count())
    return chosen


def common_store(own: Place) -> Store:
    """What all processes of this start can write to and read. ValueError without an address;
    RuntimeError where no other process answers."""
    store, _, _ = next(iter(rendezvous("env://", timeout=TIMEOUT)))
    if own.local_size == own.size:  # torchrun's store for one machine outlives a restart
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = PrefixStore(f"restart {restarts}", store)
    return store


@contextmanager
def one_voice() -> Iterator[None]:
    """For what all processes should find alike, before they have joined: where they fail alike,
    process 0 alone says it."""
    try:
        yield
    except (ValueError, OSError) as error:
        if (own := place()).size > 1:
            try:
                store = common_store(own)
            except (ValueError, RuntimeError):  # nobody to agree with
                raise error from None
            _kept.append(store)
            if own.rank:  # torchrun ends process 0 once another one has ended
                with suppress(RuntimeError):
                    store.wait([ARRIVED], TIMEOUT)
            raise_unless_said(store, own.rank, error, 0.0)
        raise


@contextmanager
def joined(mesh: str | None, device: str) -> Iterator[Shards]:
    """The mesh that this process is part of, while the `with` block lasts.

    Alone, nothing happens. An error of one process ends all: each says in a line what has failed,
    unless process 0 has said the same. `LostError` where another process has ended.
    """
    own = place()
    with one_voice():
        axes = axes_of(mesh, own)
        if own.size > 1:
            device = device_of(device, own)
    if own.size == 1:
        yield ONE_PROCESS
        return
    on_gpus = device.startswith("cuda") and own.local_size <= torch.cuda.device_count()
    store, rank, size = common_store(own), own.rank, own.size
    if rank == 0:
        store.set(ARRIVED, "")
    group = {"store": store, "rank": rank, "world_size": size, "timeout": TIMEOUT}
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo", **group)
    try:
        yield Mesh(axes, device)
    except KeyboardInterrupt as stop:
        stop.args = stop.args if rank == 0 else ("",)  # process 0 says it
        raise
    except Exception as error:  # told to the other processes, then raised again
        if isinstance(error, RuntimeError) and re.search(LOST, str(error)):
            raise LostError(lost(store, rank, size, error)) from None
        raise_unless_said(store, rank, error, 2.0)
        raise
    dist.destroy_process_group()


def raise_unless_said(store: Store, rank: int, error: Exception, seconds: float) -> None:
    """Tell other processes of an error. If it is one that a user can fix, of another process than
    0, raise it with the rank, or only end the process if 0 says the same within these seconds."""
    text = re.sub(r"^(process \d+: )+", "", str(error))
    with suppress(RuntimeError):  # the store is gone
        store.set(f"failed/{rank}", text)
        if rank == 0:
            store.set(ARRIVED, "")
    kind = next((kind for kind in (ValueError, OSError) if isinstance(error, kind)), None)
    if rank and kind:
        if said(store, 0, seconds) == text:
            raise SystemExit(2) from None
        raise kind(f"process {rank}: {text}") from None


def lost(store: Store, rank: int, size: int, error: RuntimeError) -> str:
    """What to say of a lost connection."""
    texts = {other: said(store, other, 0.0) for other in range(size)}
    failed = next((other for other, text in texts.items() if text is not None), None)
    reason = "another process has ended" if failed is None else f"process {failed} has failed"
    return f"process {rank}: {reason} ({str(error).splitlines()[0][:200]})"


def said(store: Store, rank: int, seconds: float) -> str | None:
    """The error of a process that has failed; None if it has none after these seconds."""
    end = time.monotonic() + seconds
    try:
        while not store.check([f"failed/{rank}"]):
            if time.monotonic() >= end:
                return None
            time.sleep(0.05)
        return store.get(f"failed/{rank}").decode()
    except RuntimeError:  # the store is gone too
        return None
