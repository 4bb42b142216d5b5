"""The command line: fastsae train, harvest, eval, report and others, as in help.COMMANDS."""

import logging
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any, TextIO

from fastsae.progress import print_line, printable
from fastsae.version import __version__

from .help import COMMANDS, command_help, overview

IN_MANY_PROCESSES = ("train", "sweep", "eval")
"""The commands that torchrun can start."""

NO_MEMORY = "can't allocate memory|out of memory|Storage size calculation overflowed"
"""How torch's RuntimeErrors say it."""


def main() -> None:
    """Run a command; an error that its user can fix is one line, with exit code 2."""
    for name in ("stdin", "stdout", "stderr"):  # by number: the first free one is taken
        if getattr(sys, name) is None:  # closed, or a file of the run would get its number
            setattr(sys, name, open(os.devnull, "r+", encoding="utf-8"))  # noqa: SIM115
    sys.excepthook = show_traceback
    warnings.showwarning = say_warning
    logging.setLogRecordFactory(PrintableRecord)
    code, message = 0, ""
    try:
        run(sys.argv[1:])
    except KeyboardInterrupt as stop:
        code, message = 128 + getattr(stop, "signum", signal.SIGINT), str(stop)
    except (ValueError, OSError) as error:
        code, message = 2, str(error)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search(NO_MEMORY, str(error)):
            raise
        code, message = 2, out_of_memory(str(error))
    if message:
        print_line(f"fastsae: {' '.join(message.split())}")
    try:
        sys.stderr.flush()
    except OSError:
        discard(sys.stderr)
    if code:
        sys.exit(code)


def run(words: Sequence[str]) -> None:
    """Run the command that the words of a command line ask for. Help imports no torch."""
    name, *rest = words or ["--help"]
    if name in ("-h", "--help", "--help-all"):
        show(overview())
    elif name == "--version":
        show(f"fastsae {__version__}")
    elif name not in COMMANDS:
        raise ValueError(f"the command must be one of {', '.join(COMMANDS)}, got {name!r}")
    elif {"-h", "--help", "--help-all"} & {*rest}:
        show(command_help(name, rest))
    else:
        if name not in IN_MANY_PROCESSES:
            require_one_process(name)
        text = import_module(f"fastsae.cli.{name}").main(rest)
        if text:  # of many processes, one has something to show
            show(text)


def require_one_process(name: str) -> None:
    """ValueError, which process 0 says, in one of many processes that torchrun has started.
    Clusters set RANK and WORLD_SIZE for processes that start alone, too."""
    launch = import_module("fastsae.distributed.launch")  # it imports torch
    with launch.one_voice():
        if (size := launch.place().size) > 1 and launch.dist.is_torchelastic_launched():
            raise ValueError(f"fastsae {name} runs in one process, got {size}: leave out torchrun")


def say_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Print a warning of another library, about files and models whose names are untrusted."""
    print_line(f"{category.__name__}: {' '.join(str(message).split())}")


def show_traceback(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Print the traceback of an exception that only we can fix."""
    text = "".join(traceback.format_exception(kind, error, trace))
    for line in text.rstrip("\n").split("\n"):
        print_line(line)


class PrintableRecord(logging.LogRecord):
    """What another library logs, without colors and control characters. Formatters add exc_text,
    the traceback of an exception, and stack_info to the message."""

    def getMessage(self) -> str:
        return without_colors(super().getMessage())

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("exc_text", "stack_info") and value:
            value = without_colors(value)
        super().__setattr__(name, value)


def without_colors(text: str) -> str:
    return printable_lines(re.sub(r"\x1b\[[\d;]*m", "", text).expandtabs())


def printable_lines(text: str) -> str:
    return "\n".join(map(printable, text.split("\n")))


def show(text: str) -> None:
    """Print the result of a command."""
    try:
        print(printable_lines(text))
        sys.stdout.flush()
    except BrokenPipeError:  # of a reader that has enough, such as `head`
        discard(sys.stdout)
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        discard(sys.stdout)
        raise OSError(f"the result cannot be printed: {error.strerror}") from None


def discard(stream: TextIO) -> None:
    """Drop what a stream could not write: at exit, Python would try again and fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def out_of_memory(text: str) -> str:
    """What to say of a failed allocation, from numpy's or torch's words for it."""
    found = re.search(r"allocate ([\d.]+) ?(bytes|[KMGTPE]iB)", text)
    size = found and f"{found[1]} {found[2]}"
    if found and found[2] == "bytes":
        size = f"{int(found[1]) / 2**30:,.1f} GiB"
    if shape := re.search(r"sizes=\[.*?\]", text):
        size = f"a tensor of {shape[0]}"
    tried = f": cannot allocate {size}" if size else ""
    return f"out of memory{tried}; try a smaller batch size, model or number of latents"
