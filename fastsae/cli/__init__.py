"""The command line: fastsae train | sweep | harvest | upgrade | eval | convert."""

import sys
from collections.abc import Sequence

from fastsae.train import Interrupted

from .commands import COMMANDS


def main() -> None:
    """Run a command; an error that its user can mend is one line, with exit code 2."""
    try:
        run(sys.argv[1:])
    except Interrupted as stop:
        print(f"fastsae: {stop}", file=sys.stderr)
        sys.exit(128 + stop.signum)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"fastsae: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def run(arguments: Sequence[str]) -> None:
    name, rest = (arguments[0], arguments[1:]) if arguments else (None, [])
    if name in ("-h", "--help"):
        print(usage())
    elif name not in COMMANDS:
        given = "nothing" if name is None else repr(name)
        raise ValueError(f"the command must be one of {', '.join(COMMANDS)}, got {given}")
    else:
        command = COMMANDS[name]
        command.act(command.read(rest))


def usage() -> str:
    lines = [
        "usage: fastsae COMMAND [--help] [options]",
        "",
        "Train sparse autoencoders, fast.",
        "",
    ]
    for name, command in COMMANDS.items():
        lines.append(f"  {name:<9}{(command.options.__doc__ or '').splitlines()[0]}")
    return "\n".join(lines)
