"""Writes English text that Python comes with: `python -m bench.study.text FOLDER`.

It has the topics of the documentation, and the docstrings of each module of the standard library:
about half a million tokens, which depend on Python's version alone.
"""

import ast
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from fastsae.data.demo import NOT_SOURCES

DOCUMENTED = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef


def documents() -> Iterator[tuple[str, str]]:
    """Name and text of each document."""
    for name, text in topics.items():
        yield f"topic-{name}", text
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library)
        if NOT_SOURCES.isdisjoint(name.parts) and (text := docstrings(path)):
            yield "-".join(name.with_suffix("").parts), text


def docstrings(path: Path) -> str:
    """The docstrings of a file, a blank line between any two."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="replace")))
    found = (ast.get_docstring(node) for node in nodes if isinstance(node, DOCUMENTED))
    return "\n\n".join(text for text in found if text)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True)
    for name, text in documents():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
