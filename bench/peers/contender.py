"""One contender at one task, in a process of its own: python -m bench.peers.contender TASK"""

import json
import sys
from contextlib import redirect_stdout, suppress
from importlib import import_module
from typing import Any

import torch

from bench.clock import resident_bytes
from bench.contender import LOW, Contender
from fastsae.data import ActivationShards
from fastsae.nn import Init
from fastsae.train import Optimizer
from fastsae.train.memory import keep_freed_memory

from .task import Code, Task, TimeUp, open_stream, scale_of

LENS = Contender("sae_lens", {"use_sparse_activations": False}, package="sae-lens")
SPARSIFY = Contender("sparsify", {"optimizer": "adam"}, package="eai-sparsify")
SPARSE = {"use_sparse_activations": True, "rescale_acts_by_decoder_norm": False}
"""The rescaling has no gradient on a CPU's sparse tensors."""

CONTENDERS = {
    "fastsae": Contender(),
    **{f"fastsae, {low} encoder": Contender(options={"encoder_precision": low}) for low in LOW},
    "dense PyTorch": Contender("dense"),
    "SAELens": LENS,
    "SAELens, sparse": LENS._replace(options=SPARSE),
    "dictionary_learning": Contender("dictionary_learning", package="dictionary-learning"),
    "sparsify": SPARSIFY._replace(options={"optimizer": "signum"}, adam=False),
    "sparsify, Adam": SPARSIFY,
}
for name in ("SAELens", "dictionary_learning", "sparsify"):
    own = CONTENDERS[name]
    options = {**own.options, "accelerate": True}
    CONTENDERS[f"{name}, accelerated"] = own._replace(options=options, accelerated=True)

VARIANTS = {name: one for name, one in CONTENDERS.items() if one.package is None} | {
    "fastsae, bf16 moments": Contender(options={"optimizer": Optimizer(adam_moments="bf16")}),
    "fastsae, window of 8": Contender(options={"optimizer": Optimizer(adam_window=8)}),
    "fastsae, tied encoder": Contender(options={"init": Init(encoder="tied")}),
}
"""What `python -m bench peers --variants` compares."""

KNOWN = CONTENDERS | VARIANTS

SAME_LR = ", fastsae's learning rate"
"""What the name of a run with it ends in."""


def measure(task: Task) -> dict[str, Any]:
    """Milliseconds of each step and peak memory; of a whole run, its settings and quality too."""
    contender = KNOWN[task.contender]
    keep_freed_memory()  # as fastsae's trainer does; it helps the others as well
    train = import_module(f".train_{contender.trainer}", __package__).train
    stream, trained = open_stream(task), None
    with suppress(TimeUp):
        trained = train(task, stream, **contender.options)
    peak = torch.cuda.max_memory_allocated() if task.device == "cuda" else resident_bytes()
    found: dict[str, Any] = {"ms": stream.step_ms(), "peak MB": peak / 2**20}
    if trained is not None and task.data is not None:
        found |= {"lr": trained.lr, "warm-up": trained.warmup}
        found |= quality(trained.code, ActivationShards(task.data), task.device)
    return found


@torch.no_grad()
def quality(code: Code, shards: ActivationShards, device: str) -> dict[str, float]:
    """Fraction of variance unexplained, active latents per token, and those that never are."""
    heldout = shards.heldout
    assert heldout is not None
    x = heldout.rows(torch.arange(heldout.n_tokens)) * scale_of(shards)
    variance = (x - x.mean(0)).double().square().sum()
    error, counts = 0.0, 0
    for part in x.to(device).split(4096):
        recon, active = code(part)
        error += float((part - recon).double().square().sum())
        counts += active.sum(0)
    counts = torch.as_tensor(counts, dtype=torch.float64)
    never, L0 = float((counts == 0).double().mean()), float(counts.sum()) / len(x)
    return {"held-out FVU": error / float(variance), "L0": L0, "never active": never}


if __name__ == "__main__":
    with redirect_stdout(sys.stderr):  # the libraries print
        found = measure(Task(**json.loads(sys.argv[1])))
    print(json.dumps(found))
