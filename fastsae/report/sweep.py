"""The page that compares the SAEs of a sweep."""

import os
from pathlib import Path
from urllib.parse import quote

from fastsae.train.run_table import REPORT
from fastsae.train.summary import Summary, read_results
from fastsae.train.sweep import stored_sweep

from .curves import curves_of
from .page import write_page

SCRIPTS = ("page.js", "charts.js", "sweep.js")


def write_comparison(folder: Path, out: Path) -> None:
    """Write the page on a finished sweep to the HTML file `out`: a table, the frontier, and the
    curves of its runs. ValueError if the folder holds no sweep that has ended."""
    configs = stored_sweep(folder)
    path = folder / "comparison.json"
    if not path.exists():
        raise ValueError(f"the sweep in {folder} has not ended: {path} does not exist")
    results = read_results(dict[str, Summary], path)
    if missing := results.keys() - configs:
        raise ValueError(f"{path} has {sorted(missing)[0]!r}, which sweep.json does not")
    runs = [
        {
            **curves_of(folder / name, name),
            "report": link(folder / name / REPORT, out),
            **{key: found[key] for key in ("fvu", "l0", "seconds")},
            "dead": found["dead_fraction"],
            "speed": found["tokens_per_second"],
            "d_sae": configs[name].d_sae,
        }
        for name, found in results.items()
    ]
    evaluated = sorted({found["evaluated_on"] for found in results.values()})
    about = f"Evaluated on {' and '.join(evaluated)}. Click a column's name to sort by it."
    if any(run["report"] for run in runs):
        about += " A name leads to that SAE's own report."
    else:
        about += f" For an SAE's own report, run: fastsae report {folder}/NAME."
    write_page(
        out,
        "sweep.html",
        SCRIPTS,
        {"runs": runs},
        title=folder.resolve().name,
        subtitle=f"Sweep of {len(runs)} SAEs",
        about_table=about,
    )


def link(report: Path, page: Path) -> str | None:
    """The address of a report relative to a page; None if there is no report."""
    return quote(os.path.relpath(report, page.parent)) if report.exists() else None
