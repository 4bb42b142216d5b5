"""Help, read from the source of the commands and of their settings.

A setting is documented by the string under it, which only the source has. Importing the classes
would also import torch, which takes seconds.
"""

import ast
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

COMMANDS: dict[str, tuple[str, ...]] = {
    "harvest": ("HarvestConfig",),
    "plan": ("PlanRun",),
    "train": ("Train",),
    "sweep": ("SweepCommand", "saes"),
    "upgrade": ("Upgrade", "teacher"),
    "eval": ("Eval", "run"),
    "report": ("Report", "run"),
    "convert": ("Convert", "source", "out"),
    "push": ("Push", "run", "repository"),
}
"""For each command, the class of its options, and those that are positional arguments."""

MAIN = {
    *(
        "activation",
        "recipe",
        "start_from",
        "resume",
        "saes",
        "seeds",
        "data",
        "model",
        "hookpoint",
        "text",
        "dataset",
        "out",
        "d_sae",
        "k",
        "steps",
    ),
    *("batch_size", "lr", "seed", "device", "wandb"),
    *("d_in", "tokens", "gpu", "price", "probe"),
}
"""Of the many options of training, those that --help shows; --help-all shows all."""

VALUES = {"int": "N", "float": "X", "str": "NAME", "Path": "PATH", "bool": ""}
COLUMN, WIDEST = 26, 100


class Option(NamedTuple):
    """A setting's name, its value's type in a word, and what it means."""

    name: str
    value: str
    text: str


def overview() -> str:
    """The help of fastsae: its commands."""
    lines = ["usage: fastsae COMMAND [options]", "", "Train sparse autoencoders, fast.", ""]
    for name in COMMANDS:
        lines += entry(f"  {name}", paragraphs(name)[0], 12)
    end = "`fastsae COMMAND --help` lists a command's options, `fastsae --version` the version."
    return "\n".join([*lines, "", *textwrap.wrap(end, width())])


def command_help(name: str, words: Sequence[str]) -> str:
    """The help of a command: its main options, or with --help-all all of them."""
    arguments, named = COMMANDS[name][1:], re.search(r"--activation[= ](\S+)", " ".join(words))
    activation = named[1] if named else "topk"
    brief = name in ("plan", "train", "sweep") and "--help-all" not in words
    seen: set[str] = set()
    lines = [" ".join(["usage: fastsae", name, *map(str.upper, arguments), "[options]"])]
    for paragraph in paragraphs(name):
        lines += ["", *textwrap.wrap(paragraph, width())]
    for title, options in groups(options_class(name), "Options", activation):
        whole = not brief or (named is not None and activation in title)
        shown = [o for o in options if o.name not in seen and (whole or o.name in MAIN)]
        shown.sort(key=lambda option: option.name not in arguments)
        seen |= {option.name for option in shown}
        lines += ["", f"{title}:"] if shown else []
        for option, value, text in shown:
            flag = f"--{option.replace('_', '-')} {value}".rstrip()
            lines += entry(f"  {option.upper() if option in arguments else flag}", text, COLUMN)
    about_config = "Read options from a TOML file; flags override it."
    lines += ["", *entry("  --config FILE", about_config, COLUMN)]
    if brief:
        lines += entry("  --help-all", "List all options.", COLUMN)
    return "\n".join(lines)


def paragraphs(name: str) -> list[str]:
    """The docstring of a command's options."""
    text = ast.get_docstring(options_class(name)[1]) or ""
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]


def width() -> int:
    return min(max(shutil.get_terminal_size().columns - 2, 50), WIDEST)


def entry(head: str, text: str, column: int) -> list[str]:
    """Lines of a name and what it means, from that column on."""
    margin = " " * column
    first = head.ljust(column) if len(head) < column - 1 else margin
    lines = textwrap.wrap(
        text, width(), initial_indent=first, subsequent_indent=margin, break_on_hyphens=False
    )
    return lines if first != margin else [head, *lines]


def options_class(name: str) -> tuple[str, ast.ClassDef]:
    module, found = find(f"fastsae.cli.{name}", COMMANDS[name][0]) or ("", None)
    assert isinstance(found, ast.ClassDef), name
    return module, found


def groups(
    owner: tuple[str, ast.ClassDef], title: str, activation: str
) -> Iterator[tuple[str, list[Option]]]:
    """The options of a class, and those of its fields that are such classes, with a title each."""
    options, parts = [], []
    for module, field, text in fields(*owner):
        name, kind = ast.unparse(field.target), field.annotation
        named = kind.left if isinstance(kind, ast.BinOp) else kind  # of `Part | None`
        home, part = (isinstance(named, ast.Name) and find(module, named.id)) or (module, None)
        if ast.unparse(kind) == "ActivationConfig":
            parts.append((settings_of(activation), f"Activation {activation}"))
        elif isinstance(part, ast.ClassDef):
            parts.append(((home, part), text.rstrip(".")))
        else:
            text = with_default(module, text, field.value)
            options.append(Option(name, value(module, kind), text))
    yield title, options
    for part, heading in parts:
        yield from groups(part, heading, activation)


def settings_of(activation: str) -> tuple[str, ast.ClassDef]:
    """The settings of an activation, or of the one that it is a variant of."""
    name = activation.replace("abs", "")
    module = f"fastsae.nn.{name}"
    known = name.isidentifier() and path_of(module).exists()
    for node in tree_of(module).body if known else ():
        if isinstance(node, ast.ClassDef) and node.name.lower() == f"{name}config":
            return module, node
    raise ValueError(f"there is no activation {activation!r}: see `fastsae train --help`")


def fields(module: str, node: ast.ClassDef) -> Iterator[tuple[str, ast.AnnAssign, str]]:
    """The documented fields of a class, after those of its bases, with the module they are in."""
    for base in node.bases:
        home, found = find(module, ast.unparse(base)) or (module, None)
        if isinstance(found, ast.ClassDef):
            yield from fields(home, found)
    for field, text in zip(node.body, node.body[1:], strict=False):
        match field, text:
            case ast.AnnAssign(), ast.Expr(value=ast.Constant(value=str(about))):
                yield module, field, " ".join(about.split())


def value(module: str, kind: ast.AST) -> str:
    """A type as help shows it: N for an integer, {a,b} for a choice."""
    match kind:
        case ast.Name(id=name) if name in VALUES:
            return VALUES[name]
        case ast.Name(id=name):
            found = find(module, name)
            return value(*found) if found else name.upper()
        case ast.BinOp(left=left, right=ast.Constant(value=None)):
            return value(module, left)
        case ast.BinOp(right=right):
            return value(module, right)
        case ast.Subscript(value=ast.Name(id="Literal"), slice=ast.Tuple(elts=choices)):
            return "{" + ",".join(ast.literal_eval(choice) for choice in choices) + "}"
        case ast.Subscript(slice=ast.Tuple(elts=several)):
            return " ".join(value(module, one) for one in several)
        case ast.Constant():  # the dots of tuple[int, ...]
            return "..."
    raise AssertionError(ast.unparse(kind))


def with_default(module: str, text: str, node: ast.AST | None) -> str:
    """The text, with the default if there is one and the text does not say it; names are looked up
    in the module."""
    match node:
        case _ if "default" in text.lower():
            return text
        case None | ast.Constant(value=None | False) | ast.Tuple(elts=[]):
            return text
        case ast.Constant(value=given) | ast.Call(args=[ast.Constant(value=given)]):
            shown = given  # a call is of Path
        case ast.Call(keywords=[ast.keyword(arg="default", value=ast.Constant(value=given)), *_]):
            shown = given
        case ast.Name(id=name) if found := find(module, name):  # a constant
            return with_default(found[0], text, found[1])
        case ast.Tuple(elts=several):
            shown = " ".join(map(ast.unparse, several))
        case _:
            shown = ast.unparse(node)
    return f"{text.rstrip('.')} (default: {shown})."


def find(module: str, name: str) -> tuple[str, ast.AST] | None:
    """The class, or the value, that a name stands for in a module; None for what Python has."""
    for node in tree_of(module).body:
        match node:
            case ast.ClassDef(name=found) if found == name:
                return module, node
            case ast.Assign(targets=[ast.Name(id=found)]) if found == name:
                return module, node.value
            case ast.ImportFrom(names=names) if name in {n.name for n in names}:
                own = path_of(module).stem == "__init__"
                package = f"{module if own else module.rpartition('.')[0]}." if node.level else ""
                origin = f"{package}{node.module}"
                return find(origin, name) if origin.startswith("fastsae") else None
    return None


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(path_of(module).read_text(encoding="utf-8"))


def path_of(module: str) -> Path:
    """The file of a module, which is not imported."""
    package, *names = module.split(".")
    spec = find_spec(package)
    assert spec is not None and spec.origin is not None
    path = Path(spec.origin).parent.joinpath(*names)
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
