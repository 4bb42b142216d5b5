"""Four processes that stay for a whole test session, and run functions as a mesh of any size."""

import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fastsae.distributed import Axes, Mesh

MOST = 4
SECONDS = 120


class Processes:
    """Started at their first use; every run makes new process groups."""

    def __init__(self):
        self.folder = tempfile.TemporaryDirectory()
        self.pipes: list[Connection] = []
        self.workers: list[Any] = []
        self.runs = 0

    def start(self) -> None:
        context = mp.get_context("spawn")
        for rank in range(MOST):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_work, args=(rank, theirs), daemon=True)
            worker.start()
            self.pipes.append(ours)
            self.workers.append(worker)

    def run(self, axes: tuple[int, int], task: Callable, *arguments: Any) -> list[Any]:
        """task(mesh, *arguments) on every process of a mesh of (data, latent): the results by rank.
        An exception of any process is raised here."""
        if not self.workers:
            self.start()
        self.runs += 1
        store = Path(self.folder.name) / str(self.runs)
        used = self.pipes[: axes[0] * axes[1]]
        for pipe in used:
            pipe.send((store, axes, task, arguments))
        results = []
        for rank, pipe in enumerate(used):
            assert pipe.poll(SECONDS), f"process {rank} did not answer"
            results.append(pipe.recv())
        for rank, (_, error) in enumerate(results):
            assert error is None, f"process {rank}: {error}"
        return [result for result, _ in results]

    def stop(self) -> None:
        for worker in self.workers:
            worker.kill()
        self.folder.cleanup()


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def as_started(processes: Processes, size: int, *words: str | Path) -> list[str]:
    """What `fastsae ...` returns in each of so many processes, as torchrun would start them."""
    return processes.run((1, size), _command, str(free_port()), [*map(str, words)])


def _command(mesh: Mesh, port: str, words: list[str]) -> str:
    dist.destroy_process_group()  # the command makes its own
    own = dict.fromkeys(("RANK", "LOCAL_RANK"), str(mesh.rank))
    every = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(mesh.size))
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with patch.dict(os.environ, own | every | where):
        command, *options = words
        return import_module(f"fastsae.cli.{command}").main(options)


def _work(rank: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        store, axes, task, arguments = pipe.recv()
        size, result, error = axes[0] * axes[1], None, None
        try:
            files = f"file://{store}"
            dist.init_process_group("gloo", files, rank=rank, world_size=size)
            result = task(Mesh(Axes(*axes)), *arguments)
        except BaseException:
            error = traceback.format_exc()
        if dist.is_initialized():
            dist.destroy_process_group()
        pipe.send((result, error))
