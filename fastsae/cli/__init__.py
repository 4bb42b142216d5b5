"""The command line: fastsae train | sweep | harvest | upgrade | eval | convert."""

import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from fastsae.version import __version__

from .help import COMMANDS, command_help, overview


def main() -> None:
    """Run a command; an error that its user can fix is one line, with exit code 2."""
    try:
        run(sys.argv[1:])
        if sys.stdout is not None:  # it is where the process began with it closed
            sys.stdout.flush()
    except BrokenPipeError:  # of a reader that has enough, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt as stop:
        if str(stop):
            print(f"fastsae: {stop}", file=sys.stderr)
        sys.exit(128 + getattr(stop, "signum", signal.SIGINT))
    except (ValueError, OSError) as error:
        print(f"fastsae: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def run(words: Sequence[str]) -> None:
    """Run the command that the words of a command line ask for. Help imports no torch."""
    name, *rest = words or ["--help"]
    if name in ("-h", "--help", "--help-all"):
        print(overview())
    elif name == "--version":
        print(f"fastsae {__version__}")
    elif name not in COMMANDS:
        raise ValueError(f"the command must be one of {', '.join(COMMANDS)}, got {name!r}")
    elif {"-h", "--help", "--help-all"} & {*rest}:
        print(command_help(name, rest))
    else:
        import_module(f"fastsae.cli.{name}").main(rest)
