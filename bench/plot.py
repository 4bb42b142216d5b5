"""Plots a sweep of the kernel benchmark: time per call against one size."""

from pathlib import Path
from typing import Any

LINES = {"ms": "fastsae", "torch": "PyTorch", "compile": "torch.compile"}
SIZES = {"N": "tokens", "D": "width", "F": "latents", "K": "active latents per token"}


def plot_sweep(rows: list[dict[str, Any]], letter: str, path: Path) -> None:
    """Plot the times of fastsae and of its baselines with their spread, and the roof."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes: Any = figure.subplots()
    rows = [row for row in rows if "ms" in row]
    sizes, roof = [row["shape"][letter] for row in rows], [row["roof ms"] for row in rows]
    for name, label in LINES.items():
        times = [(r if name == "ms" else r.get(name, {})).get("ms") for r in rows]
        spans = zip(sizes, times, strict=True)
        found = [(size, ms["median"], ms["min"], ms["max"]) for size, ms in spans if ms]
        if found:
            at, middle, low, high = zip(*found, strict=True)
            axes.plot(at, middle, "o-", label=label)
            axes.fill_between(at, low, high, alpha=0.2)
    axes.plot(sizes, roof, "k--", label="roof: measured copy or GEMM")
    shown = [y for line in axes.lines for y in line.get_ydata()]
    axes.set(xscale="log", yscale="log", title=", ".join({row["name"] for row in rows}))
    axes.set_ylim(min(shown) / 2, max(shown) * 2)  # so that one slow call does not hide the lines
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.set_xticks([], minor=True)
    axes.set(xlabel=f"{SIZES[letter]} ({letter})", ylabel="time per call (ms)")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=120)
