"""Plots the study's differences in FVU with their intervals, a panel per paper."""

from pathlib import Path
from typing import Any

from .claims import CLAIMS, SMALLEST, Claim, Difference, Runs, difference

COLORS = {"better": "tab:green", "worse": "tab:red", "equivalent": "tab:blue"}
"""By verdict; gray for what the seeds do not tell."""


def plot(data: dict[str, Runs], path: Path) -> None:
    """Write the plot, with a panel for each paper of which a claim was measured."""
    from matplotlib.figure import Figure

    papers: dict[str, list[tuple[str, Difference]]] = {}
    for claim in (c for c in CLAIMS if c.metric == "fvu"):
        for name, runs in data.items():
            if (found := difference(claim, runs)) is not None:
                papers.setdefault(claim.paper, []).append((label(claim, name, data), found))
    heights = [len(rows) + 2 for rows in papers.values()]
    figure = Figure(figsize=(10, 0.19 * sum(heights) + 0.6), layout="constrained")
    panels: Any = figure.subplots(len(papers), height_ratios=heights, sharex=True, squeeze=False)
    for axes, (paper, rows) in zip(panels[:, 0], papers.items(), strict=True):
        for place, (_, found) in enumerate(rows):
            color = COLORS.get(found.verdict, "tab:gray")
            span = found.half * 100 if found.half < float("inf") else None
            axes.errorbar(found.center * 100, -place, xerr=span, fmt="o", ms=4, color=color)
        axes.axvspan(-100 * SMALLEST, 100 * SMALLEST, color="tab:blue", alpha=0.12)
        axes.axvline(0, color="black", lw=0.8)
        axes.set_yticks([-place for place in range(len(rows))], [text for text, _ in rows])
        axes.set_ylim(0.5 - len(rows), 0.5)
        axes.set_title(paper, fontsize=9, loc="left")
        axes.set_xscale("symlog", linthresh=10, linscale=1.5)
        axes.grid(axis="x", alpha=0.3)
        axes.tick_params(labelsize=7)
    ticks = [-50, -10, -5, 0, 5, 10, 50, 500]
    panels[-1, 0].set_xticks(ticks, [f"{tick:+d} %" if tick else "0" for tick in ticks])
    meaning = "green: better, red: worse, blue: equivalent, gray: undecided or not comparable"
    figure.supxlabel(f"difference in FVU with 95 % interval ({meaning})", fontsize=9)
    figure.savefig(path, dpi=110)


def label(claim: Claim, name: str, data: dict[str, Runs]) -> str:
    return f"{claim.method}  vs.  {claim.other}" + f"   ({name})" * (len(data) > 1)
