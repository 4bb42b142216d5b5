"""One contender at one task, in a process of its own: python -m bench.peers.contender TASK"""

import json
import sys
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from bench.clock import resident_bytes
from bench.contender import Contender
from fastsae.data import ActivationShards
from fastsae.train.memory import keep_freed_memory

from .stream import TimeUp, open_stream, scale_of
from .task import Task

CONTENDERS = {
    "fastsae": Contender(),
    "fastsae, bf16 encoder": Contender(options={"encoder_precision": "bf16"}),
    "dense PyTorch": Contender("dense"),
    "SAELens": Contender("sae_lens", {"use_sparse_activations": False}, package="sae-lens"),
    "SAELens, sparse": Contender(  # whose rescaling has no gradient on a CPU's sparse tensors
        "sae_lens",
        {"use_sparse_activations": True, "rescale_acts_by_decoder_norm": False},
        package="sae-lens",
    ),
    "dictionary_learning": Contender("dictionary_learning", package="dictionary-learning"),
    "sparsify": Contender("sparsify", {"optimizer": "signum"}, package="eai-sparsify", adam=False),
    "sparsify, Adam": Contender("sparsify", {"optimizer": "adam"}, package="eai-sparsify"),
}
CONTENDERS |= {
    f"{name}, accelerated": own._replace(
        options={**own.options, "accelerate": True}, accelerated=True
    )
    for name, own in CONTENDERS.items()
    if name in ("SAELens", "dictionary_learning", "sparsify")
}

SAME_LR = ", fastsae's learning rate"
"""What the name of a run with it ends in."""


def measure(task: Task) -> dict[str, Any]:
    """Milliseconds of each step and peak memory; of a whole run, its settings and quality too."""
    contender = CONTENDERS[task.contender]
    keep_freed_memory()  # as fastsae's trainer does; it helps the others as well
    train = import_module(f".train_{contender.trainer}", __package__).train
    stream, trained = open_stream(task), None
    with suppress(TimeUp):
        trained = train(task, stream, **contender.options)
    found: dict[str, Any] = {"ms": stream.step_ms(), "peak MB": peak(task.device)}
    if trained is not None and task.data is not None:
        found |= {"lr": trained.lr, "warm-up": trained.warmup}
        found |= quality(trained.code, ActivationShards(task.data), task.device)
    return found


def peak(device: str) -> float:
    """Resident megabytes, or those on the GPU."""
    used = torch.cuda.max_memory_allocated() if device == "cuda" else resident_bytes()
    return used / 2**20


@torch.no_grad()
def quality(
    code: Callable[[Tensor], tuple[Tensor, Tensor]], shards: ActivationShards, device: str
) -> dict[str, float]:
    """Fraction of variance unexplained and active latents per token, on held-out tokens."""
    heldout = shards.heldout
    assert heldout is not None
    x = heldout.rows(torch.arange(heldout.n_tokens)) * scale_of(shards)
    variance = (x - x.mean(0)).double().square().sum()
    error, active = 0.0, 0
    for part in x.to(device).split(4096):
        recon, counts = code(part)
        error += float((part - recon).double().square().sum())
        active += int(counts.sum())
    return {"held-out FVU": error / float(variance), "L0": active / len(x)}


if __name__ == "__main__":
    with redirect_stdout(sys.stderr):  # the libraries print
        found = measure(Task(**json.loads(sys.argv[1])))
    print(json.dumps(found))
