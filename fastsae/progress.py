"""What a run shows on stderr: lines, and progress bars on terminals and in notebooks.

Lines go through the logger `fastsae`, which prints them as they are unless its user configures it
otherwise. It does not propagate: a handler of the root logger would print them a second time.
"""

import logging
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

TIMES = "{elapsed}<{remaining}, ends {eta:%H:%M}, {rate_fmt}{postfix}"
FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [" + TIMES + "]"


def printable(text: str, most: int = 2000) -> str:
    """Text for a terminal: control and invisible characters escaped, the middle left out if it is
    longer than `most`. Names in files and of files may contain anything."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def say(text: str, level: int = logging.INFO) -> None:
    """Log a line, as the logger `fastsae`."""
    LOGGER.log(level, printable(text))


def print_line(text: str) -> None:
    """Print a line on stderr, above the progress bars. It is lost if stderr is closed or full, or
    its reader has left: that must not stop a run."""
    from tqdm import tqdm  # here, so that kernels and steps can be used without it

    if sys.stderr is not None:
        with suppress(OSError, ValueError):  # a ValueError if it is closed
            tqdm.write(printable(text), file=sys.stderr)


class Stderr(logging.Handler):
    """Prints lines on what is sys.stderr at that time."""

    def emit(self, record: logging.LogRecord) -> None:
        print_line(self.format(record))


LOGGER = logging.getLogger("fastsae")
LOGGER.setLevel(logging.INFO)
LOGGER.propagate = False
LOGGER.addHandler(Stderr())


def shows_bars() -> bool:
    terminal = sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()
    return terminal or "ipykernel" in sys.modules


def progress_bar(
    label: str,
    unit: str,
    total: int | None,
    initial: int = 0,
    *,
    shown: bool = True,
    over: Iterable[Any] | None = None,
) -> Any:
    """A tqdm bar, which iterates over what is given; total is None where it is unknown."""
    from tqdm.auto import tqdm

    return tqdm(
        over,
        desc=label,
        unit=unit,
        unit_scale=unit == "token",
        total=total,
        initial=initial,
        disable=not (shown and shows_bars()),
        bar_format=FORMAT if total else None,
        dynamic_ncols=True,
    )
