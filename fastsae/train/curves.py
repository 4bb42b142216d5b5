"""Plots a run's metrics."""

import importlib.util
from pathlib import Path
from typing import Any

PANELS = {
    "fvu": "fraction of variance unexplained",
    "l0": "active latents per token",
    "dead_fraction": "dead latents (fraction)",
    "tokens_per_second": "tokens per second",
}


def plot_curves(lines: list[dict[str, Any]], path: Path, title: str) -> bool:
    """Plot the lines of metrics.jsonl to a PNG; False without matplotlib or lines."""
    if not lines or importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    figure.suptitle(title)
    steps = [line["step"] for line in lines]
    for axes, (name, label) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        axes.plot(steps, [line[name] for line in lines], linewidth=1.2, label="training")
        evaluated = [line for line in lines if f"heldout_{name}" in line]
        if evaluated:
            x, y = ([line[key] for line in evaluated] for key in ("step", f"heldout_{name}"))
            axes.plot(x, y, "o-", markersize=3, linewidth=1.2, label="held-out")
            axes.legend(fontsize=8)
        axes.set_title(label, fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if name == "fvu":
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
    figure.savefig(path, dpi=120)
    return True
