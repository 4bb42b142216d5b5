"""kernels/README.md names the right file and symbol for every op; files keep to one convention."""

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch

import fastsae_kernels

CARD = Path(__file__).parents[2] / "kernels" / "README.md"
PACKAGE = CARD.parent / "fastsae_kernels"
COLUMNS = ["op", "kernel", "function", "reference", "cpu", "test", "benchmark"]
MORE = {
    "adam_",
    "center",
    "latent_major",
    "quantize_rows",
    "rescore",
    "rotation_gradients",
    "sum_runs",
    "encode_topk(shadow=...)",
}
"""Ops with a row that the package itself does not export."""

LINK = re.compile(r"\[`?([^]`]+)`?\]\(([^)#]+)\)")
OPTIONAL = "kernel", "function"


def rows() -> list[dict[str, str]]:
    lines = [line for line in CARD.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return [dict(zip(COLUMNS, row, strict=True)) for row in cells]


ROWS = {" ".join(LINK.sub(r"\1", row["op"]).split(", ")): row for row in rows()}
"""By their ops."""


def linked(cell: str) -> list[tuple[str, Path]]:
    """What each link of a cell says, and the file that it leads to."""
    return [(text, CARD.parent / path) for text, path in LINK.findall(cell)]


def definitions(path: Path) -> dict[str, ast.FunctionDef | ast.ClassDef]:
    """Functions and classes of a file, by name."""
    nodes = ast.parse(path.read_text(encoding="utf-8")).body
    return {n.name: n for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}


def test_every_op_has_a_row():
    assert set(" ".join(ROWS).split()) == {*fastsae_kernels.__all__, *MORE}


@pytest.mark.parametrize("column", COLUMNS[:5])
@pytest.mark.parametrize("op", ROWS)
def test_symbols_are_where_the_card_says(op, column):
    cell = ROWS[op][column]
    if column in OPTIONAL and cell == "–":
        return
    links = linked(cell)
    assert links
    for name, path in links:
        name = name.split("(")[0]
        node = definitions(path)[name]
        if column == "kernel":
            assert isinstance(node, ast.FunctionDef)
            assert any("triton.jit" in ast.unparse(each) for each in node.decorator_list)
        if column == "function" and name.startswith("_"):
            module = import_module(f"fastsae_kernels.{path.stem}")
            assert issubclass(getattr(module, name), torch.autograd.Function)


@pytest.mark.parametrize("op", ROWS)
def test_tests_and_benchmarks_are_of_the_op(op):
    names = [name.split("(")[0] for name in op.split()]
    ((_, test),) = linked(ROWS[op]["test"])
    assert all(re.search(rf"\b{name}\b", test.read_text(encoding="utf-8")) for name in names)
    ((command, bench),) = linked(ROWS[op]["benchmark"])
    assert command == f"python -m bench kernels --op {names[0]}" and bench.is_dir()


def test_every_kernel_is_in_the_table():
    found = {
        (name, path.name)
        for path in PACKAGE.glob("*.py")
        for name in definitions(path)
        if name.endswith("_kernel")
    }
    shown = {(name, path.name) for row in ROWS.values() for name, path in linked(row["kernel"])}
    assert shown == found


def test_other_links_of_the_card_lead_somewhere():
    for _, path in linked(CARD.read_text(encoding="utf-8")):
        assert path.exists(), path


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.name)
def test_only_kernel_files_need_triton(path):
    """Each belongs to an op, which imports it only where a kernel runs."""
    if re.fullmatch(r"_\w+_kernel\.py", path.name):
        assert (PACKAGE / f"{path.stem.removeprefix('_').removesuffix('_kernel')}.py").exists()
        return
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for module in modules:
            assert module.split(".")[0] != "triton" and not module.endswith("_kernel"), module
