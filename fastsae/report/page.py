"""Renders a report: one HTML file with its style, scripts and data inside."""

import base64
import gzip
import hashlib
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fastsae.files import write_atomically
from fastsae.progress import printable
from fastsae.version import __version__

ASSETS = Path(__file__).parent / "assets"
STYLES = ("base.css", "overview.css", "latents.css")


def write_page(
    path: Path, template: str, scripts: Sequence[str], data: dict[str, Any], **texts: Any
) -> None:
    """Render a template to a file, which depends on nothing else; the same for the same arguments.

    The page's policy runs this script and loads nothing. What comes from data is escaped by the
    template or set as text by the script.
    """
    style, script = inlined(STYLES), inlined(scripts)
    page = _templates().get_template(template)
    rendered = page.render(
        version=__version__,
        style=Markup(style),
        style_hash=hash_of(style),
        script=Markup(script),
        script_hash=hash_of(script),
        data=Markup(packed(data)),
        **texts,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: temporary.write_text(rendered, "utf-8", newline="\n"))


def inlined(names: Sequence[str]) -> str:
    """The contents of some assets, one after the other."""
    return "\n".join((ASSETS / name).read_text(encoding="utf-8") for name in names)


@cache
def _templates() -> Environment:
    return Environment(
        loader=FileSystemLoader(ASSETS, encoding="utf-8"),
        autoescape=True,
        finalize=visible_text,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def visible_text(value: Any) -> Any:
    """What a template shows of a value: names in files and of files may hold anything."""
    return printable(value) if type(value) is str else value


def hash_of(text: str) -> str:
    """By which the page's policy knows its own script and style."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def packed(data: dict[str, Any]) -> str:
    """JSON, compressed without a time, in base64."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()
