"""Several processes played by threads of one: what they agree on, with nothing of torch."""

import pickle
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from fastsae.shards import Shards

Anything = TypeVar("Anything")


class Process(Shards):
    """A process of a mesh that is a thread."""

    def __init__(self, rank: int, data: int, latent: int, barrier: threading.Barrier, told: list):
        self.rank, self.size, self.data, self.latent = rank, data * latent, data, latent
        self.data_rank, self.latent_rank = divmod(rank, latent)
        self.barrier, self.told = barrier, told

    def rows(self, d_sae: int) -> slice:
        if d_sae % self.latent:
            raise ValueError(f"d_sae = {d_sae} is not divisible by {self.latent}")
        share = d_sae // self.latent
        return slice(self.latent_rank * share, (self.latent_rank + 1) * share)

    def all_of(self, value: Anything) -> list[Anything]:
        self.told[self.rank] = pickle.dumps(value)
        self.barrier.wait()
        found = [pickle.loads(one) for one in self.told]
        self.barrier.wait()  # nobody may speak again before all have heard
        return found


def run(data: int, latent: int, act: Callable[[Process], Any]) -> list[Any]:
    """What act() returns on each process of a mesh, by rank, or the exception that it raises. One
    that is no Exception kills its process: the others' next meeting fails."""
    size = data * latent
    barrier, told = threading.Barrier(size, timeout=60), [b""] * size
    results: list[Any] = [None] * size

    def one(rank: int) -> None:
        try:
            results[rank] = act(Process(rank, data, latent, barrier, told))
        except BaseException as error:
            results[rank] = error
            if not isinstance(error, Exception):
                barrier.abort()

    threads = [threading.Thread(target=one, args=(rank,), name=str(rank)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def run_all(data: int, latent: int, act: Callable[[Process], Any]) -> list[Any]:
    """The same where nothing may fail."""
    results = run(data, latent, act)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
