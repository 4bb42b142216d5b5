"""Writes English text from Python and its packages, a file per document.

    python -m bench.study.text FOLDER [PACKAGE ...]

It has the topics of Python's documentation, and the docstrings of each module of the standard
library and of the packages. Without packages, these are about half a million tokens and depend on
Python's version alone.
"""

import argparse
import ast
import sys
import sysconfig
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

from fastsae.data.demo import NOT_SOURCES

DOCUMENTED = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef


def documents(packages: list[Path]) -> Iterator[tuple[str, str]]:
    """Name and text of each document."""
    for name, text in topics.items():
        yield f"topic-{name}", text
    library = Path(sysconfig.get_path("stdlib"))
    for folder, root in [(library, library), *((p, p.parent) for p in packages)]:
        for path in sorted(folder.rglob("*.py")):
            name = path.relative_to(root)
            if NOT_SOURCES.isdisjoint(name.parts) and (text := docstrings(path)):
                yield "-".join(name.with_suffix("").parts), text


def docstrings(path: Path) -> str:
    """The docstrings of a file, a blank line between any two; "" if it is not of this Python."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
    except (SyntaxError, ValueError) as error:  # ValueError for null bytes
        print(f"skipping {path}: {error}", file=sys.stderr)
        return ""
    nodes = (node for node in ast.walk(tree) if isinstance(node, DOCUMENTED))
    found = (ast.get_docstring(node) for node in nodes)
    return "\n\n".join(text for text in found if text)


def package(name: str) -> Path:
    """The folder of an installed package, for argparse."""
    spec = find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise argparse.ArgumentTypeError(f"no package {name!r} is installed")
    return Path(spec.submodule_search_locations[0])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m bench.study.text",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="a new folder, for the texts")
    parser.add_argument("packages", nargs="*", type=package, help="names of installed packages")
    arguments = parser.parse_args()
    try:
        arguments.folder.mkdir(parents=True)
    except FileExistsError:
        parser.error(f"{arguments.folder} is there already")
    for name, text in documents(arguments.packages):
        (arguments.folder / f"{name}.txt").write_text(text, encoding="utf-8")
