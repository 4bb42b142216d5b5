"""Where a run's numbers go: metrics.jsonl, the progress bar, and trackers."""

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from fastsae.config import from_json
from fastsae.files import shown, write_atomically
from fastsae.progress import progress_bar, say, shows_bars

from .loggers import Loggers

SOMETIMES = {
    "heldout_fvu": ("held-out FVU", "{:.4f}"),
    "downstream": ("downstream", "{:.4f}"),
    "candidate_recall": ("recall", "{:.2%}"),
    "documents_per_batch": ("documents", "{:.0f}"),
    "gpu_memory_gb": ("memory_gb", "{:.1f}"),
    "gpu_utilization": ("utilization", "{:.0%}"),
    "gpu_watts": ("watts", "{:.0f}"),
}
"""What some lines have, and how it is shown."""


class Line(TypedDict):
    """What every line of metrics.jsonl has; most have more."""

    step: int
    fvu: float
    l0: float
    dead_fraction: float
    tokens_per_second: float
    heldout_fvu: NotRequired[float]
    heldout_l0: NotRequired[float]
    heldout_dead_fraction: NotRequired[float]


class Log:
    """Open it with `with`; each line goes to every place that is switched on."""

    def __init__(self, out: Path, steps: int, first_step: int, shown: bool, loggers: Loggers):
        """If it is shown, it has a bar on terminals, and prints lines elsewhere."""
        self.path, self._loggers = out / "metrics.jsonl", loggers
        keep_lines(self.path, first_step)
        self._shown, self._live = shown, shows_bars()
        self.last: dict[str, Any] = {}
        self._on_bar: dict[str, str] = {}
        self._bar = progress_bar("train", "step", steps, first_step, shown=shown)

    def advance(self) -> None:
        self._bar.update()

    def write(self, line: dict[str, Any]) -> None:
        """Record a line; `step` and `tokens` say where it belongs."""
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
        except OSError as error:
            raise OSError(f"{self.path} cannot be written: {error.strerror}") from None
        self.last = line
        if self._shown:
            self._show(line)
        self._loggers.log(line)

    def _show(self, line: dict[str, Any]) -> None:
        shown = {
            "FVU": f"{line['fvu']:.4f}",
            "L0": f"{line['l0']:.1f}",
            "dead": f"{line['dead_fraction']:.1%}",
            "tok/s": f"{line['tokens_per_second']:,.0f}",
        }
        for name, (title, form) in SOMETIMES.items():
            if name in line:
                shown[title] = form.format(line[name])
        if self._live:
            self._on_bar |= shown  # what not every line has stays until there is another
            self._bar.set_postfix(self._on_bar)
        else:
            text = "  ".join(f"{name} {value}" for name, value in shown.items())
            left = line["seconds"] / line["step"] * (self._bar.total - line["step"])
            say(f"step {line['step']}/{self._bar.total}  {text}  ETA {left:.0f}s")

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.close()


class Unlogged(Log):
    """Of a process that leaves logging to another."""

    def __init__(self):
        self.last = {}
        self._bar = progress_bar("train", "step", 0, shown=False)

    def write(self, line: dict[str, Any]) -> None:
        self.last = line


def plain_numbers(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line with Python numbers in place of those of numpy and torch; ValueError, naming the
    entry, for what is neither text nor a finite number."""
    plain = dict(line)
    for name, value in line.items():
        with suppress(AttributeError, ValueError, RuntimeError):  # the last two: not of one number
            plain[name] = value.item()
        found = plain[name]
        finite = isinstance(found, float) and math.isfinite(found)
        if not finite and not isinstance(found, str | int | None):
            raise ValueError(
                f"entries of a line of metrics must be finite numbers or text, "
                f"got {name} = {' '.join(shown(value).split())}"
            )
    return plain


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file, up to one that a crash cut short or damaged."""
    lines = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines():
        try:
            found = json.loads(line)
            from_json(Line, found, str(path))
        except (ValueError, RecursionError):
            break
        lines.append(found)
    return lines


def keep_lines(path: Path, last_step: int) -> None:
    """Drop from a metrics file what was logged after the step a run resumes from."""
    lines = [line for line in read_lines(path) if line["step"] <= last_step]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
