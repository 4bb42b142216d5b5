"""Plots of the kernel table."""

from pathlib import Path
from typing import Any

LINES = {"ms": "fastsae", "torch": "PyTorch", "compile": "torch.compile"}
SIZES = {"N": "tokens", "D": "width", "F": "latents", "K": "active latents per token"}


def plot_sweep(rows: list[dict[str, Any]], letter: str, path: Path) -> None:
    """Times of an op, of the others, each with its spread, and the roof: at most four lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes: Any = figure.subplots()
    rows = [row for row in rows if "ms" in row]
    for name, label in LINES.items():
        times = [
            (r["shape"][letter], (r if name == "ms" else r.get(name, {})).get("ms")) for r in rows
        ]
        found = [(size, ms["median"], ms["min"], ms["max"]) for size, ms in times if ms]
        if found:
            sizes, middle, low, high = zip(*found, strict=True)
            axes.plot(sizes, middle, "o-", label=label)
            axes.fill_between(sizes, low, high, alpha=0.2)
    roof = [(row["shape"][letter], row["roof ms"]) for row in rows]
    axes.plot(*zip(*roof, strict=True), "k--", label="roof: bytes, or FLOPs")
    axes.set(xscale="log", yscale="log", title=", ".join({row["name"] for row in rows}))
    axes.set(xlabel=f"{SIZES[letter]} ({letter})", ylabel="time per call (ms)")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=120)
