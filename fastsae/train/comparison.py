"""Compares the runs of a sweep in one table and one plot."""

import importlib.util
from pathlib import Path
from typing import Any

from fastsae.evals.verdict import verdict
from fastsae.files import write_json
from fastsae.progress import printable

from .curves import plain_log_ticks
from .labels import label_points
from .log import read_lines
from .summary import Summary, read_results

COLUMNS = {
    "fvu": ("FVU", "{:.4f}"),
    "l0": ("L0", "{:.1f}"),
    "dead_fraction": ("dead", "{:.2%}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
    "seconds": ("seconds", "{:.0f}"),
}


def compare(out: Path, names: list[str]) -> dict[str, Summary]:
    """Write comparison.json of the runs of these names in a sweep's folder, and comparison.png."""
    found = {name: read_results(Summary, out / name / "summary.json") for name in names}
    write_json(out / "comparison.json", found)
    if importlib.util.find_spec("matplotlib") is not None:
        _plot(out, found)
    return found


def comparison_table(found: dict[str, Summary]) -> str:
    """A row for each run, best FVU first, and notes: what is poor, and whether no held-out data was
    evaluated on."""
    ranked = sorted(found.items(), key=lambda item: item[1]["fvu"])
    rows = [["SAE", *(title for title, _ in COLUMNS.values())]]
    for name, run in ranked:
        numbers = (form.format(run[key]) for key, (_, form) in COLUMNS.items())
        rows.append([printable(name), *numbers])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for name, *cells in rows:
        numbers = (f"{c:>{w}}" for c, w in zip(cells, widths[1:], strict=True))
        lines.append("  ".join([f"  {name:<{widths[0]}}", *numbers]))
    for name, run in ranked:
        for field in ("fvu", "l0", "dead_fraction"):
            level, sentence = verdict(field, run[field], run.get("activation", ""))
            if level == "poor":
                title, form = COLUMNS[field]
                lines.append(f"  {printable(name)}: {title} {form.format(run[field])}: {sentence}")
    if any(run["evaluated_on"] == "training data" for run in found.values()):
        lines.append("  evaluated on training data")
    return "\n".join(lines)


def _plot(out: Path, found: dict[str, Summary]) -> None:
    """FVU over the steps, and where each run ended between L0 and FVU."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    curves, results = figure.subplots(1, 2)
    points: dict[str, tuple[float, float, Any]] = {}
    for name, summary in found.items():
        lines = read_lines(out / name / "metrics.jsonl")
        steps, fvu = ([line[key] for line in lines] for key in ("step", "fvu"))
        (drawn,) = curves.plot(steps, fvu, linewidth=1.2)
        points[name] = summary["l0"], summary["fvu"], drawn.get_color()
        results.scatter(summary["l0"], summary["fvu"], color=drawn.get_color(), zorder=3)
    curves.set_xlabel("step")
    curves.set_title("in training", fontsize=10)
    results.set_xlabel("active latents per token")
    results.set_title("saved SAEs (lower left is better)", fontsize=10)
    results.margins(0.25)
    for axes in (curves, results):
        axes.set_ylabel("fraction of variance unexplained")
        axes.grid(alpha=0.3)
        plain_log_ticks(axes.yaxis)
    label_points(results, points)
    figure.savefig(out / "comparison.png", dpi=120)
