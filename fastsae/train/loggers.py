"""Experiment trackers, which get a run's numbers as its directory does."""

import json
import logging
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from fastsae.files import read_json
from fastsae.progress import printable, say

from .config import TrainConfig
from .run_table import REPORT

Setting = str | int | float | bool


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What a tracker is told of a run when it starts or resumes."""

    out: Path
    """Its directory."""

    step: int
    """The step from which it continues; 0 for a new run."""

    settings: dict[str, Any]
    """All settings, what was planned from them, and the environment: versions, commit, machine."""

    @property
    def flat(self) -> dict[str, Setting]:
        """The settings without nesting, such as `optimizer.betas`."""
        return dict(_flat(self.settings))


@runtime_checkable
class Logger(Protocol):
    """A tracker, for `Trainer(config, source, loggers=[...])`.

    If `start` raises, the run does not start. If it fails later, the run warns and continues
    without it. Of many processes that make one run, only process 0 calls it.
    """

    def start(self, run: RunInfo) -> None:
        """Called before the first step, and again when a run is resumed."""
        ...

    def log(self, step: int, numbers: Mapping[str, int | float]) -> None:
        """Called with every line of metrics."""
        ...

    def end(self, results: Mapping[str, Any] | None) -> None:
        """Called once at the end, with what summary.json has, and the SAE and report in the run's
        directory; without results if the run is interrupted."""
        ...


class Loggers:
    """Several loggers, whose failures do not end the run."""

    def __init__(self, several: Sequence[Logger]):
        self._working = list(several)
        self._results: Mapping[str, Any] | None = None

    @contextmanager
    def started(self, out: Path, step: int) -> Iterator[None]:
        """While it is open, the run in a directory is logged, from a step on. ValueError if a
        tracker cannot start."""
        begun: list[Logger] = []
        run = RunInfo(out=out, step=step, settings=_settings(out)) if self._working else None
        try:
            for one in self._working:
                assert run is not None, "there are loggers"
                try:
                    one.start(run)
                except Exception as error:  # of any library; its user can mend most of them
                    raise ValueError(
                        f"{_name(one)} did not start: {error}; start the run in {out} again with "
                        f"--resume"
                    ) from error
                begun.append(one)
            yield
        finally:
            self._working = [one for one in self._working if one in begun]
            self._each(lambda one: one.end(self._results))

    def log(self, line: Mapping[str, Any]) -> None:
        """Log a line of metrics; `step` says where it belongs."""
        numbers = {name: value for name, value in line.items() if name != "step"}
        self._each(lambda one: one.log(line["step"], numbers))

    def finish(self, out: Path) -> None:
        """Take the results of the run in a directory, for the end."""
        if self._working:
            self._results = read_json(out / "summary.json")

    def _each(self, hook: Callable[[Logger], None]) -> None:
        for one in [*self._working]:
            try:
                hook(one)
            except Exception as error:  # a tracker's failure must not end hours of training
                self._working.remove(one)
                text = printable(f"{_name(one)} failed; logging to it stops: {error}", 300)
                say(text, logging.WARNING)


class TensorBoard:
    """Logs to OUT/tensorboard, with the settings as text and as hyperparameters."""

    def start(self, run: RunInfo) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.run, self.last = run, run.step
        self.writer = SummaryWriter(str(run.out / "tensorboard"), purge_step=run.step + 1)
        text = json.dumps(run.settings, indent=1)
        self.writer.add_text("settings", f"```\n{text}\n```", run.step)

    def log(self, step: int, numbers: Mapping[str, int | float]) -> None:
        self.last = step
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def end(self, results: Mapping[str, Any] | None) -> None:
        from torch.utils.tensorboard.summary import hparams

        found = final_numbers(results)
        for name, value in found.items():
            self.writer.add_scalar(name, value, self.last)
        if found:
            for part in hparams(self.run.flat, found):
                self.writer.file_writer.add_summary(part)  # pyright: ignore[reportOptionalMemberAccess]
        self.writer.close()


class WandB:
    """Logs to a Weights & Biases project, with its files in OUT/wandb.

    With `artifacts`, it also stores the SAE and the report there. A resumed run continues the same
    W&B run.
    """

    def __init__(self, project: str, artifacts: bool = False):
        self.project, self.artifacts = project, artifacts

    def start(self, run: RunInfo) -> None:
        import wandb

        self.out = run.out
        self.run = wandb.init(
            project=self.project,
            name=run.out.name,
            id=self.id_of(run.out),
            resume="allow",
            dir=str(run.out),
            config=run.settings,
            reinit="create_new",  # the SAEs of a sweep are runs side by side
        )

    @staticmethod
    def id_of(out: Path) -> str:
        """The id of the run in a directory, drawn when it starts and kept there."""
        path = out / "wandb" / "id"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            path.write_text(secrets.token_hex(8))
        return path.read_text()

    def log(self, step: int, numbers: Mapping[str, int | float]) -> None:
        self.run.log(dict(numbers), step=step)

    def end(self, results: Mapping[str, Any] | None) -> None:
        self.run.summary.update(final_numbers(results))
        if results is not None and self.artifacts:
            self.store("sae", "model")
            if (self.out / REPORT).exists():
                self.store(REPORT, "report")
        self.run.finish()

    def store(self, name: str, kind: str) -> None:
        """Store a file or directory of the run."""
        import wandb

        path = self.out / name
        artifact = wandb.Artifact(f"{self.run.id}-{path.stem}", kind)
        (artifact.add_dir if path.is_dir() else artifact.add_file)(str(path))
        self.run.log_artifact(artifact)


def loggers_of(config: TrainConfig, given: Sequence[Logger]) -> list[Logger]:
    """The loggers that a config asks for, and those given."""
    found: list[Logger] = []
    if config.tensorboard:
        found.append(TensorBoard())
    if config.wandb is not None:
        found.append(WandB(config.wandb, config.wandb_artifacts))
    return [*found, *given]


def final_numbers(results: Mapping[str, Any] | None) -> dict[str, int | float]:
    """The numbers of summary.json, as `final/fvu`; for those on held-out data, `heldout/fvu`."""
    on_heldout = results is not None and results["evaluated_on"] == "held-out data"
    evaluated = "fvu", "fvu_all", "l0", "dead_fraction"
    return {
        f"{'heldout' if on_heldout and name in evaluated else 'final'}/{name}": value
        for name, value in (results or {}).items()
        if isinstance(value, int | float)
    }


def _settings(out: Path) -> dict[str, Any]:
    """What config.json says of the run in a directory."""
    document = read_json(out / "config.json")
    return {**document["config"], **{n: v for n, v in document.items() if n != "config"}}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Setting]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value if isinstance(value, Setting) else json.dumps(value)


def _name(logger: Logger) -> str:
    return type(logger).__name__
