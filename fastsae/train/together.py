"""What the processes of a run agree on: that they make the same one, and when it ends."""

import hashlib
from typing import TYPE_CHECKING

import torch

from fastsae.checkpoint import Checkpoint, newest_intact
from fastsae.data import Batch, Batches
from fastsae.data.ordinary import SAMPLE_TOKENS
from fastsae.distributed.parallelize import per_latent
from fastsae.meeting import everywhere
from fastsae.shards import Shards

from .interrupt import Interrupted, Interrupts
from .state import TrainState, names_per_latent

if TYPE_CHECKING:
    from .trainer import Trainer

FAILED = 1 << 16
"""Above every signal's number."""


def check_same_run(trainer: "Trainer", resume: bool) -> None:
    """ValueError, naming what differs, unless all processes make the same run on the same data."""
    if trainer.shards.size == 1:
        return
    sample = trainer.source.sample(SAMPLE_TOKENS, trainer.config.seed)
    parts = {
        "settings": repr(trainer.config).encode("utf-8", "replace"),
        "what follows from them": repr(trainer.plan).encode(),
        "--resume": repr(resume).encode(),
        "data": trainer.source.fingerprint.encode(),
        "the activations of a sample": sample.numpy().tobytes(),
    }
    digests = {name: hashlib.sha256(part).hexdigest() for name, part in parts.items()}
    for rank, others in enumerate(trainer.shards.all_of(digests)):
        if differ := [name for name, digest in digests.items() if others[name] != digest]:
            raise ValueError(
                f"all processes must make the same run, but processes {trainer.shards.rank} and "
                f"{rank} differ in {', '.join(differ)}"
            )


def latest(trainer: "Trainer") -> Checkpoint | None:
    """The newest intact checkpoint of the run, with the rows of this process."""
    with torch.device("meta"):
        sae = trainer.columns.build(trainer.config)
    names = names_per_latent(per_latent(sae))
    found = newest_intact([trainer.config.out / "checkpoints"], names, trainer.shards)
    return found[0] if found else None


def take_together(
    trainer: "Trainer", batches: Batches, state: TrainState, interrupts: Interrupts
) -> Batch:
    """The next batch, of every process. Each one waits for its data alone. An error of one is
    raised on all; `Interrupted` if a signal has come to any, once all have saved."""
    batch, error = None, None
    try:
        batch = trainer.take(batches, state, interrupts)
    except ValueError as raised:
        error = raised
    news = trainer.shards.largest(FAILED if error else interrupts.signum or 0)

    def check() -> None:
        if error is not None:
            raise error

    if news == FAILED:
        everywhere(trainer.shards, check)
    if news:
        trainer.save(state)
        raise Interrupted(
            news,
            f"stopped at step {state.step} of {trainer.plan.steps}, saved; "
            f"continue with --resume --out {trainer.config.out}",
        )
    assert batch is not None, "without a signal there is a batch"
    return batch


def end_together(shards: Shards, state: TrainState) -> None:
    """A run that a callback ended in one process has ended in all."""
    if shards.largest(state.stopped is not None):
        state.stopped = next(filter(None, shards.all_of(state.stopped)))
