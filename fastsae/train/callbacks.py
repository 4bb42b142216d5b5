"""What a run does besides training: evaluation, early stopping, and what its user adds."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fastsae.data import ActivationSource
from fastsae.evals import reconstruction
from fastsae.nn import SAE
from fastsae.shards import ONE_PROCESS, Shards

from .config import TrainConfig
from .log import read_lines
from .state import TrainState

if TYPE_CHECKING:
    from .trainer import Trainer

HELDOUT_TOKENS = 16384
"""Tokens of an evaluation during training."""


class StopTraining(Exception):
    """Raised by `on_step` or `on_log` of a callback, ends the run as if this step was its last. The
    message, which says why, is stored in summary.json."""


class Callback:
    """Base class of callbacks, which a `Trainer` calls during the run. Here, they do nothing.

    `trainer` has the run's `config`, `plan` and `source`, and `trainer.snapshot(state)` is the SAE
    as it would be saved now. `state` is the run itself: a callback that changes it, or torch's
    random state, changes the run. Exceptions of callbacks propagate. Where many processes make a
    run, each calls its own; the run ends if one of them asks for that. What works with the SAE that
    they share, such as an evaluation of a snapshot, must be called on every process.
    """

    def on_step(self, trainer: "Trainer", state: TrainState) -> None:
        """Called after every step; `state.step` counts from 1."""

    def on_log(self, trainer: "Trainer", state: TrainState, line: dict[str, Any]) -> None:
        """Called before a line of metrics is written; finite numbers, of Python, numpy or torch,
        and text that are added to it are logged too."""

    def on_checkpoint(self, trainer: "Trainer", state: TrainState) -> None:
        """Called after a checkpoint was saved."""

    def on_end(self, trainer: "Trainer", sae: SAE) -> None:
        """Called at the end of the run, with its results in `trainer.config.out`."""


class HeldoutEvaluation(Callback):
    """Adds the SAE's numbers on held-out data to every line of metrics at a multiple of `every`."""

    def __init__(self, every: int):
        self.every = every

    def on_log(self, trainer: "Trainer", state: TrainState, line: dict[str, Any]) -> None:
        if state.step % self.every:
            return
        assert trainer.source.heldout is not None, "checked by check_heldout"
        found = reconstruction(
            trainer.snapshot(state),
            trainer.source.heldout,
            max_tokens=HELDOUT_TOKENS,
            device=trainer.device,
            pc_ranks=(),
            max_norm_ratio=trainer.config.max_norm_ratio,
        )
        for name in ("fvu", "l0", "dead_fraction"):
            line[f"heldout_{name}"] = getattr(found, name)


class EarlyStopping(Callback):
    """Ends the run once `patience` evaluations in a row did not lower the held-out FVU.

    To count as lower, the FVU must be below the lowest one by more than `min_delta`. Evaluations
    are those of `eval_every`, from the start of the run, also if it was resumed.
    """

    def __init__(self, patience: int, min_delta: float = 0.0):
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}")
        if not 0 <= min_delta < math.inf:
            raise ValueError(f"min_delta must be at least 0 and finite, got {min_delta}")
        self.patience, self.min_delta = patience, min_delta

    def on_log(self, trainer: "Trainer", state: TrainState, line: dict[str, Any]) -> None:
        if "heldout_fvu" not in line or trainer.shards.rank:  # process 0 writes and reads the file
            return
        lines = [*read_lines(trainer.config.out / "metrics.jsonl"), line]
        lowest, since = math.inf, 0
        for fvu in (found["heldout_fvu"] for found in lines if "heldout_fvu" in found):
            since += 1
            if fvu < lowest - self.min_delta:
                lowest, since = fvu, 0
        if since >= self.patience:
            raise StopTraining(
                f"the held-out FVU was not below {lowest:.4f} in the last {since} evaluations"
            )


Hook = Callable[[Callback], None]


class Callbacks(Callback):
    """Several callbacks as one. Processes may have different ones, or some of them none."""

    def __init__(self, several: Sequence[Callback], shards: Shards = ONE_PROCESS):
        """Made by all processes at once."""
        self.several, self.shards = tuple(several), shards
        self.anywhere = bool(shards.control.largest(len(self.several)))

    def on_step(self, trainer: "Trainer", state: TrainState) -> None:
        self._call(_ending(trainer, state, lambda one: one.on_step(trainer, state)), state)

    def on_log(self, trainer: "Trainer", state: TrainState, line: dict[str, Any]) -> None:
        self._call(_ending(trainer, state, lambda one: one.on_log(trainer, state, line)), state)

    def on_checkpoint(self, trainer: "Trainer", state: TrainState) -> None:
        self._call(lambda one: one.on_checkpoint(trainer, state), state)

    def on_end(self, trainer: "Trainer", sae: SAE) -> None:
        self._call(lambda one: one.on_end(trainer, sae))

    def _call(self, hook: Hook, state: TrainState | None = None) -> None:
        """Call a hook of each. A run that one of them ended in some process has ended in all."""
        for one in self.several:
            with self.shards.apart():
                hook(one)
        stopped = state and state.stopped
        if self.anywhere and self.shards.together(stopped is not None) and state is not None:
            state.stopped = next(filter(None, self.shards.all_of(stopped)))


def _ending(trainer: "Trainer", state: TrainState, hook: Hook) -> Hook:
    """A hook that may end the run."""

    def call(one: Callback) -> None:
        try:
            hook(one)
        except StopTraining as stop:
            state.stopped = str(stop), trainer.plan.steps
            of = f"{trainer.name}: " if trainer.name else ""
            trainer.say(f"{of}ended early at step {state.step} of {trainer.plan.steps}: {stop}")

    return call


def check_heldout(config: TrainConfig, source: ActivationSource) -> None:
    """ValueError for evaluations without held-out data. A stream makes these data here."""
    if config.eval_every is not None and source.heldout is None:
        raise ValueError(f"eval_every = {config.eval_every} needs held-out data, and there is none")


def callbacks_of(config: TrainConfig, given: Sequence[Callback]) -> list[Callback]:
    """The callbacks that a config asks for, and those given; ValueError without the evaluations
    that they need."""
    found: list[Callback] = []
    if config.eval_every is not None:
        found.append(HeldoutEvaluation(config.eval_every))
    if config.patience is not None:
        found.append(EarlyStopping(config.patience))
    if config.eval_every is None and any(isinstance(one, EarlyStopping) for one in given):
        raise ValueError("early stopping needs eval_every, got None")
    return [*found, *given]
