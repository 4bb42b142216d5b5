"""Measures the memory of each process of a run that divides its SAE among several.

    python -m bench scaling --measure

trains for a few steps at shape d with 1, 2 and 4 processes of one thread, and saves checkpoints and
the SAE. `torchrun ... -m bench.sharded_memory FOLDER` is one of these runs.

columns: bytes of weights, optimizer state and counters of a process; then, beyond what the process
had before it built anything, its resident memory between steps and the largest one in each phase.
Of all processes, the largest number counts.
"""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastsae.distributed import Axes, Mesh
from fastsae.nn import SAE, TopKConfig
from fastsae.shards import ONE_PROCESS, Shards
from fastsae.train import TrainConfig, Trainer
from fastsae.train.callbacks import Callback
from fastsae.train.state import TrainState

from .clock import resident_bytes
from .problem import SHAPES
from .record import markdown

SHAPE, PROCESSES = "d", (1, 2, 4)


class Meter(Callback):
    """Notes the memory of this process in MB."""

    def __init__(self):
        self.found: dict[str, float] = {}
        self.reset()
        self.before = resident_bytes("VmRSS")

    def reset(self) -> None:
        """Start the peak of the next phase, at what is in use now: freed memory, which the trainer
        keeps to reuse it, would hide what is allocated next."""
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")

    def note(self, name: str, size: int) -> None:
        self.found[name] = max(round(size / 1e6), self.found.get(name, 0))

    def peak(self, phase: str) -> None:
        """End a phase."""
        self.note(f"peak, {phase}", resident_bytes() - self.before)
        self.reset()

    def on_step(self, trainer: Trainer, state: TrainState) -> None:
        self.note("weights and state", sum(t.nbytes for t in state.tensors().values()))
        self.peak("start and first step" if state.step == 1 else "further steps")
        self.note("in use after a step", resident_bytes("VmRSS") - self.before)

    def on_checkpoint(self, trainer: Trainer, state: TrainState) -> None:
        self.peak("checkpoints")

    def on_end(self, trainer: Trainer, sae: SAE) -> None:
        self.peak("final SAE and its evaluation")


def run(folder: Path) -> list[dict[str, float]]:
    """What every process notes, by rank; under torchrun, the processes share the latents."""
    torch.set_num_threads(1)
    shards = ONE_PROCESS
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
        shards = Mesh(Axes(latent=dist.get_world_size()))
    N, d, F, k = SHAPES[SHAPE]
    torch.manual_seed(0)
    data = torch.randn(2 * N, d)
    train(data, d, k, folder / "small", shards)  # loads the code that every run needs
    return shards.all_of(train(data, F, k, folder / "large", shards))


def train(data: Tensor, F: int, k: int, out: Path, shards: Shards) -> dict[str, float]:
    """What this process notes in a run."""
    batches: dict[str, Any] = {"steps": 4, "batch_size": len(data) // 2, "checkpoint_every": 2}
    config = TrainConfig(d_sae=F, activation=TopKConfig(k=k), out=out, device="cpu", **batches)
    meter = Meter()
    Trainer(config, data, callbacks=[meter], progress=False, shards=shards).fit()
    return meter.found


def measure() -> dict[str, Any]:
    """A row for each number of processes, printed as a table."""
    rows = {}
    for latent in PROCESSES:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={latent}"]
        with TemporaryDirectory() as folder:
            command = [sys.executable, *launch * (latent > 1), "-m", "bench.sharded_memory", folder]
            output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
        found = json.loads(output.splitlines()[-1])
        rows[latent] = {name: max(one[name] for one in found) for name in found[0]}
        print(f"{latent}: {found}", flush=True)
    titles = ["processes, in MB", *rows[1]]
    print(markdown(titles, [(latent, *row.values()) for latent, row in rows.items()]))
    return {"unit": "MB", "shape": SHAPES[SHAPE], "processes": rows}


if __name__ == "__main__":
    found = run(Path(sys.argv[1]))
    if int(os.environ.get("RANK", 0)) == 0:
        print(json.dumps(found))
    if dist.is_initialized():
        dist.destroy_process_group()
