"""What the processes of a run agree on: that they make the same one, and when it ends."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastsae.checkpoint import Checkpoint, list_checkpoints, metadata, newest_intact
from fastsae.data import ActivationSource, Batch, Batches
from fastsae.data.ordinary import SAMPLE_TOKENS
from fastsae.distributed.parallelize import per_latent
from fastsae.meeting import everywhere, on_first
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
    process; None for a run that has none. Those of runs that have not ended early are of the same
    step if a step has one of each."""
    shards, folders = trainers[0].shards, [t.config.out / "checkpoints" for t in trainers]
    names = dict(zip(folders, map(_per_latent, trainers), strict=True))

    def newest(*some: Path) -> Sequence[Checkpoint | None]:
        return newest_intact({folder: names[folder] for folder in some}, shards) or []

    found = dict[Path, Checkpoint | None]()
    ended = on_first(shards, lambda: [*map(_ended_early, trainers)])
    for trainer, folder in zip(trainers, folders, strict=True):
        if ended.pop(0):
            for one in newest(folder):  # an older one, if the newest is damaged
                if one and _stopped(trainer, one[1]):
                    found[folder] = one
    going = [folder for folder in folders if folder not in found]
    if together := newest(*going) if going else []:
        found |= zip(going, together, strict=True)
    else:
        found |= {folder: next(iter(newest(folder)), None) for folder in going}
    return [found[folder] for folder in folders]


def _per_latent(trainer: "Trainer") -> Sequence[str]:
    """The tensors of the run's checkpoints that have rows for latents."""
    with torch.device("meta"):
        return [*names_per_latent(per_latent(trainer.columns.build(trainer.config)))]


def _ended_early(trainer: "Trainer") -> bool:
    """Whether the newest checkpoint of a run says that it has ended early."""
    try:
        paths = list_checkpoints(trainer.config.out / "checkpoints")
        return bool(paths) and _stopped(trainer, metadata(paths[-1]))
    except ValueError:
        return False


def _stopped(trainer: "Trainer", meta: Mapping[str, Any]) -> bool:
    stopped = meta.get("stopped")  # the reason, and the steps that were asked for
    return isinstance(stopped, list) and stopped[1:] == [trainer.plan.steps]


def take_together(
    runs: Sequence[Run], batches: Batches, interrupts: Interrupts, out: Path, step: int
) -> Batch:
    """The batch after `step` of runs that share them, in `out`, for every process. Each one waits
    for its data alone. An error of one is raised on all; `Interrupted` if a signal has come to any,
    once all have saved."""
    batch, error, (trainer, _) = None, None, runs[0]
    try:
        batch = trainer.take(batches, step, interrupts)
    except Exception as raised:
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
        raise stopped(news, f"at step {step} of {trainer.plan.steps}", out)
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
