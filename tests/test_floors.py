"""Imports point down: a module may import its own package and the floors below it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

FLOORS = [
    {"fastsae_kernels"},
    {
        "fastsae.version",
        "fastsae.config",
        "fastsae.codes",
        "fastsae.device",
        "fastsae.environment",
        "fastsae.files",
        "fastsae.memory",
        "fastsae.progress",
    },
    {"fastsae.shards"},
    {"fastsae.nn", "fastsae.meeting"},
    {"fastsae.losses", "fastsae.distributed", "fastsae.sharded"},
    {"fastsae.data", "fastsae.checkpoint", "fastsae.interop", "fastsae.dropin"},
    {"fastsae.evals", "fastsae.estimate"},
    {"fastsae.train"},
    {"fastsae.upgrade", "fastsae.hub"},
    {"fastsae.report"},
    {"fastsae.cli", "fastsae"},
]
POSIX = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
FLOOR = {name: n for n, names in enumerate(FLOORS) for name in names}
ROOT = Path(__file__).parents[1]
FILES = [*(ROOT / "kernels").rglob("*.py"), *(ROOT / "fastsae").rglob("*.py")]


def part(module: str) -> str:
    """The name in FLOORS that a module belongs to."""
    return next(p for p in (".".join(module.split(".")[:2]), module.split(".")[0]) if p in FLOOR)


def imported(path: Path) -> Iterator[str]:
    """Modules that a file imports by their whole names, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    names = path.relative_to(ROOT).with_suffix("").parts
    own = part(".".join(names[1:] if names[0] == "kernels" else names).removesuffix(".__init__"))
    for module in imported(path):
        if module.split(".")[0] in ("fastsae", "fastsae_kernels"):
            other = part(module)
            assert other == own or FLOOR[other] < FLOOR[own], f"{own} may not import {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_module_is_needed_that_windows_lacks(path):
    assert not POSIX & {module.split(".")[0] for module in imported(path)}


def test_only_one_module_reads_the_environment():
    readers = [path.name for path in FILES if "os.environ" in path.read_text()]
    assert set(readers) <= {"_launch.py", "demo.py", "launch.py"}  # $XDG_CACHE_HOME, torchrun
