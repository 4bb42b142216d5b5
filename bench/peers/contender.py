"""Runs one contender on one task, in its own process: python -m bench.peers.contender TASK"""

import json
import sys
from contextlib import redirect_stdout, suppress
from importlib import import_module
from typing import Any

import torch

from bench.clock import resident_bytes
from bench.contender import LOW, Contender
from fastsae.data import ActivationShards
from fastsae.losses import Objective
from fastsae.memory import keep_freed_memory
from fastsae.nn import Init
from fastsae.train import Optimizer

from .task import Code, Task, TimeUp, open_stream, standardization_of

LENS = Contender("sae_lens", {"use_sparse_activations": False}, package="sae-lens")
SPARSIFY = Contender("sparsify", {"optimizer": "adam"}, package="eai-sparsify")
SPARSE = {"use_sparse_activations": True, "rescale_acts_by_decoder_norm": False}
"""SAELens's rescaling has no gradient for sparse tensors on a CPU."""

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
for name in ("SAELens", "dictionary_learning", "sparsify", "sparsify, Adam"):
    accelerate = {**CONTENDERS[name].options, "accelerate": True}
    CONTENDERS[f"{name}, accelerated"] = CONTENDERS[name]._replace(options=accelerate)

VARIANTS = {name: one for name, one in CONTENDERS.items() if one.package is None} | {
    "fastsae, bf16 moments": Contender(options={"optimizer": Optimizer(adam_moments="bf16")}),
    "fastsae, second moment per row": Contender(
        options={"optimizer": Optimizer(adam_second="row")}
    ),
    "fastsae, decay over half": Contender(options={"optimizer": Optimizer(decay=0.5)}),
    "fastsae, decay from the start": Contender(options={"optimizer": Optimizer(decay=1.0)}),
    "fastsae, window of 8": Contender(options={"optimizer": Optimizer(adam_window=8)}),
    "fastsae, fitted encoder": Contender(options={"init": Init(encoder="fitted")}),
    "fastsae, FVU": Contender(options={"objective": Objective(error="fvu")}),
}
"""Contenders of `python -m bench peers --variants`."""

KNOWN = CONTENDERS | VARIANTS


def measure(task: Task) -> dict[str, Any]:
    """Milliseconds of each step; for a complete run, also its settings and quality.

    Peak memory is that of training, so a run with a curve, which is evaluated in between, has none.
    All contenders keep freed memory, as fastsae's trainer does: it speeds up the others as well.
    """
    contender = KNOWN[task.contender]
    keep_freed_memory()
    torch.manual_seed(task.seed)
    train = import_module(f".train_{contender.trainer}", __package__).train
    stream, trained = open_stream(task), None
    shards = ActivationShards(task.data) if task.data else None
    points: list[dict[str, float]] = []
    if shards is not None and task.curve:
        stream.at_step = lambda step, code: points.append(
            {"step": step, **quality(code, shards, task.device, CURVE_TOKENS)}
        )
    with suppress(TimeUp):
        trained = train(task, stream, **contender.options)
    found: dict[str, Any] = {"ms": stream.step_ms()}
    if stream.at_step is None:
        peak = torch.cuda.max_memory_allocated() if task.device == "cuda" else resident_bytes()
        found |= {"peak MB": peak / 2**20}
    if trained is not None and shards is not None:
        found |= {"lr": trained.lr, "warm-up": trained.warmup}
        found |= quality(trained.code, shards, task.device)
        if stream.at_step is not None:
            stream.at_step(task.steps, trained.code)
            found |= {"curve": points}
    return found


CURVE_TOKENS = 16384
"""Held-out tokens on which a curve's points are measured."""


@torch.no_grad()
def quality(
    code: Code, shards: ActivationShards, device: str, tokens: int | None = None
) -> dict[str, float]:
    """Held-out FVU, L0, and the fraction of latents that are never active; of all held-out tokens,
    or of as many that are evenly spaced."""
    heldout = shards.heldout
    assert heldout is not None
    count = min(tokens or heldout.n_tokens, heldout.n_tokens)
    rows = torch.linspace(0, heldout.n_tokens - 1, count, dtype=torch.float64).round().long()
    x = standardization_of(shards)(heldout.rows(rows))
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
    with redirect_stdout(sys.stderr):  # the libraries print to stdout, which is for the result
        found = measure(Task(**json.loads(sys.argv[1])))
    print(json.dumps(found))
