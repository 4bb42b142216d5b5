"""Tables in Markdown of the study's results; docs/study.md explains the metrics."""

from math import isfinite
from pathlib import Path
from statistics import mean, stdev

from bench.record import markdown

from .claims import ABS, CLAIMS, FRACTIONS, Claim, Difference, Runs, difference
from .plan import DATA, MAP, USUAL, Scale, at, teachers

COLUMNS = {"lr": 2, "fvu": 4, "l0": 1, "dead": 3, "utilization": 3, "pcr": 4, "components": 0}
COLUMNS |= {"pursuit gap": 3, "ce recovered": 4, "recovery": 3}
"""Number of digits of each metric."""


def report(scale: Scale, data: dict[str, Runs], folder: Path) -> str:
    """Write results.md; returns the text."""
    stamps = [run["stamp"] for runs in data.values() for s in runs.values() for run in s.values()]
    machines = {f"{s['cpu']}, torch {s['torch']}, commit {s['commit']}" for s in stamps}
    about = f"Written by `python -m bench study`: {scale.steps} steps of {scale.batch_size} tokens,"
    about += f" {scale.tune_steps} more for upgrades and their teachers. Differences have 95 % t "
    about += f"intervals over seeds, tables standard deviations. {'; '.join(sorted(machines))}."
    rows = [row for c in CLAIMS for name, runs in data.items() if (row := claim_row(c, name, runs))]
    titles = ["paper", "says", "method", "against", "data", "metric", "values", "difference", ""]
    parts = ["# Study", about, "## Claims", markdown(titles, rows)]
    for name, runs in data.items():
        planned = DATA[name].methods, DATA[name].upgrades, teachers(DATA[name])
        measured = f"{len(runs)} of {sum(map(len, planned))} methods were measured."
        parts += [f"## {name}", measured, table(runs)]
        for prefix in ("", "Batch"):
            if found := abs_top_k_map(runs, prefix):
                title = f"{prefix}AbsTopK's FVU relative to {prefix}TopK's, by k, on {name}:"
                parts += [title, found]
    text = "\n\n".join(parts) + "\n"
    (folder / "results.md").write_text(text)
    return text


def claim_row(claim: Claim, name: str, runs: Runs) -> list[str] | None:
    """A claim on one data set, with its numbers; None if a method is missing."""
    if (found := difference(claim, runs)) is None:
        return None
    unit = " points" if claim.metric in FRACTIONS else " %"
    change = interval(found) + unit + ("" if isfinite(found.half) else " (one seed)")
    if claim.metric == "pcr":
        change += f" (at most {1 / found.theirs - 1:+.1%})"
    digits = COLUMNS[claim.metric]
    values = f"{found.ours:.{digits}f} vs. {found.theirs:.{digits}f}"
    *words, metric = claim
    return [*words, name, metric, values, change, found.verdict]


def interval(found: Difference) -> str:
    """A difference in hundredths, with its interval unless it is of one seed."""
    half = f" ± {found.half * 100:.1f}" if isfinite(found.half) else ""
    return f"{found.center * 100:+.1f}{half}"


def abs_top_k_map(runs: Runs, prefix: str) -> str:
    """AbsTopK's FVU relative to TopK's by k and latents per dimension, bold where it is better and
    with "?" where not comparable; "" unless several were measured. The prefix is "" or "Batch"."""
    cells: dict[tuple[int, float], str] = {}
    for cell in (USUAL, *MAP):
        ours, theirs = (f"{prefix}{name}, {at(*cell)}" for name in ("AbsTopK", "TopK"))
        claim = Claim(ABS, "better", ours, theirs)
        if (found := difference(claim, runs)) is not None:
            bold = "**" * (found.verdict == "better")
            doubt = " ?" * found.verdict.startswith("not comparable")
            cells[cell] = f"{bold}{interval(found)} %{bold}{doubt}"
    if len(cells) < 2:
        return ""
    sizes, expansions = (sorted(set(numbers)) for numbers in zip(*cells, strict=True))
    titles = ["latents per dimension", *(f"k = {k}" for k in sizes)]
    rows = [[f"{x:g}", *(cells.get((k, x), "–") for k in sizes)] for x in expansions]
    return markdown(titles, rows)


def table(runs: Runs) -> str:
    """A table of all methods: mean and standard deviation over seeds of each metric."""
    rows = [
        [method, len(seeds)]
        + [spread([r[n] for r in seeds.values() if n in r], d) for n, d in COLUMNS.items()]
        for method, seeds in runs.items()
    ]
    return markdown(["", "seeds", *COLUMNS], rows)


def spread(values: list[float], digits: int) -> str:
    """Mean ± standard deviation."""
    middle = f"{mean(values):.{digits}f}" if values else "–"
    return middle + (f" ± {stdev(values):.{digits}f}" if values[1:] else "")
