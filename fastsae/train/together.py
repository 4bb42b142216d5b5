"""What the processes of a run agree on: that they make the same one, and when it ends."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastsae.checkpoint import Checkpoint, newest_intact
from fastsae.data import ActivationSource, Batch, Batches
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


Run = tuple["Trainer", TrainState]


def check_same_run(
    shards: Shards, settings: Mapping[str, object], source: ActivationSource, seed: int | None
) -> None:
    """ValueError, naming what differs, unless all processes make the same run on the same data. A
    sample of the activations is compared if there is a seed for it."""
    if shards.size == 1:
        return
    parts = {
        **{name: repr(value).encode("utf-8", "replace") for name, value in settings.items()},
        "data": source.fingerprint.encode(),
    }
    if seed is not None:
        sample = source.sample(SAMPLE_TOKENS, seed)
        parts["the activations of a sample"] = sample.numpy().tobytes()
    digests = {name: hashlib.sha256(part).hexdigest() for name, part in parts.items()}
    for rank, others in enumerate(shards.all_of(digests)):
        if differ := [name for name, digest in digests.items() if others[name] != digest]:
            raise ValueError(
                f"all processes must make the same run, but processes {shards.rank} and {rank} "
                f"differ in {', '.join(differ)}"
            )


def latest(trainers: Sequence["Trainer"]) -> Sequence[Checkpoint | None]:
    """The newest intact checkpoints of runs that take the same batches, with the rows of this
    process; None for a run that has none. They are of the same step if a step has one of each."""
    folders = dict[Path, Collection[str]]()
    for trainer in trainers:
        with torch.device("meta"):
            sae = trainer.columns.build(trainer.config)
        folders[trainer.config.out / "checkpoints"] = names_per_latent(per_latent(sae))
    shards = trainers[0].shards
    if found := newest_intact(folders, shards):
        return found
    each = [newest_intact({folder: names}, shards) for folder, names in folders.items()]
    return [one[0] if one else None for one in each]


def take_together(
    runs: Sequence[Run], batches: Batches, interrupts: Interrupts, out: Path
) -> Batch:
    """The next batch of runs that share them, in `out`, for every process. Each one waits for its
    data alone. An error of one is raised on all; `Interrupted` if a signal has come to any, once
    all have saved."""
    batch, error, (trainer, state) = None, None, runs[0]
    try:
        batch = trainer.take(batches, state, interrupts)
    except ValueError as raised:
        error = raised
    news = trainer.shards.control.largest(FAILED if error else interrupts.signum or 0)

    def check() -> None:
        if error is not None:
            raise error

    if news == FAILED:
        everywhere(trainer.shards, check)
    if news:
        for one, own in runs:
            one.save(own)
        raise stopped(news, f"at step {state.step} of {trainer.plan.steps}", out)
    assert batch is not None, "without a signal there is a batch"
    return batch


def stopped(signum: int, when: str, out: Path) -> Interrupted:
    """The end of runs in `out` that a signal stopped, once they are saved."""
    return Interrupted(signum, f"stopped {when}, saved; continue with --resume --out {out}")


def wait_for_groups(shards: Shards, interrupts: Interrupts, out: Path) -> None:
    """Return once all processes have trained their SAEs of the sweep in `out`. If others end before
    that, it is `Interrupted` where a signal has come to this process, and a RuntimeError if not."""
    try:
        shards.all_of(None)
    except RuntimeError:
        if signum := interrupts.noted():
            raise stopped(signum, "before other processes had trained their SAEs", out) from None
        raise
