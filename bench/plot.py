"""Plots of the kernel table."""

from pathlib import Path
from typing import Any

from .roofs import Roofs

LINES = {"ms": "fastsae", "torch": "PyTorch", "compile": "torch.compile"}
SIZES = {"N": "tokens", "D": "width", "F": "latents", "K": "active latents per token"}


def plot_kernels(rows: list[dict[str, Any]], roofs: Roofs, sweep: str | None, path: Path) -> None:
    """Times of one op over a sweep; or a point per op under the roof."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes: Any = figure.subplots()
    rows = [row for row in rows if "ms" in row and (sweep or row["flops"])]
    if not rows:
        raise ValueError("nothing to plot: no op was timed")
    plot_sweep(axes, rows, sweep) if sweep else plot_roofline(axes, rows, roofs)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=120)


def plot_sweep(axes: Any, rows: list[dict[str, Any]], letter: str) -> None:
    """Ours, the others, each with its spread, and the roof: at most four lines."""
    for name, label in LINES.items():
        times = [
            (r["shape"][letter], (r if name == "ms" else r.get(name, {})).get("ms")) for r in rows
        ]
        found = [(size, ms["median"], ms["min"], ms["max"]) for size, ms in times if ms]
        if found:
            sizes, middle, low, high = zip(*found, strict=True)
            axes.plot(sizes, middle, "o-", label=label)
            axes.fill_between(sizes, low, high, alpha=0.2)
    sizes = [row["shape"][letter] for row in rows]
    axes.plot(sizes, [row["roof ms"] for row in rows], "k--", label="roof")
    axes.set_xlabel(f"{SIZES[letter]} ({letter})")
    axes.set_ylabel("time per call (ms)")
    axes.set_title(rows[0]["name"])


def plot_roofline(axes: Any, rows: list[dict[str, Any]], roofs: Roofs) -> None:
    """Work per byte and per second; the roof is the copy's bandwidth, then each GEMM's rate."""
    densities = [row["flops"] / row["bytes"] for row in rows]
    for n, (x, row) in enumerate(zip(densities, rows, strict=True)):
        axes.plot(x, row["TFLOP/s"], "o", color="C0")
        place = (x, row["TFLOP/s"]), (4, 4 if n % 2 else -10)
        axes.annotate(row["name"], *place, textcoords="offset points", size=7)
    for rate in sorted({row["rate"] for row in rows}):
        ridge = roofs.rates[rate] / roofs.bandwidth
        xs = [min(densities) / 2, ridge, 2 * max(*densities, ridge)]
        ys = [min(x * roofs.bandwidth, roofs.rates[rate]) / 1e12 for x in xs]
        axes.plot(xs, ys, "--", label=f"roof: copy, then {rate} GEMM")
    axes.set_xlabel("intensity (FLOPs per byte that must move)")
    axes.set_ylabel("rate (TFLOP/s)")
