"""Plots of the kernel table."""

from pathlib import Path
from typing import Any

from .roofs import Roofs


def plot_kernels(rows: list[dict[str, Any]], roofs: Roofs, sweep: str | None, path: Path) -> None:
    """Times of one op over a sweep; or a point per op under the roof."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    rows = [row for row in rows if "ms" in row]
    if sweep:
        plot_sweep(axes, rows, sweep)
    else:
        plot_roofline(axes, rows, roofs)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=120)


def plot_sweep(axes: Any, rows: list[dict[str, Any]], letter: str) -> None:
    """Ours with its spread, the others, and the roof: at most four lines."""
    sizes = [row["shape"][letter] for row in rows]
    ms = [row["ms"] for row in rows]
    middle = [one["median"] for one in ms]
    spread = [
        [one["median"] - one["min"] for one in ms],
        [one["max"] - one["median"] for one in ms],
    ]
    axes.errorbar(sizes, middle, spread, fmt="o-", label="fastsae", capsize=3)
    for name, label in {"torch": "PyTorch", "compile": "torch.compile"}.items():
        found = [(n, r[name]["ms"]["median"]) for n, r in zip(sizes, rows, strict=True)
                 if "ms" in r.get(name, {})]  # fmt: skip
        if found:
            axes.plot(*zip(*found, strict=True), "s-", label=label)
    axes.plot(sizes, [row["roof ms"] for row in rows], "k--", label="roof")
    meaning = {"N": "tokens", "D": "width", "F": "latents", "K": "active latents per token"}
    axes.set_xlabel(f"{meaning[letter]} ({letter})")
    axes.set_ylabel("time per call (ms)")
    axes.set_title(rows[0]["name"])
    axes.legend()


def plot_roofline(axes: Any, rows: list[dict[str, Any]], roofs: Roofs) -> None:
    """Work per byte and per second; the roof is the copy's bandwidth, then each GEMM's rate."""
    points = [
        (row["flops"] / row["bytes"], row["flops"] / row["ms"]["median"] / 1e9, row["name"])
        for row in rows
        if row["flops"]
    ]
    for n, (x, y, name) in enumerate(points):
        axes.plot(x, y, "o", color="C0")
        axes.annotate(name, (x, y), (4, 4 if n % 2 else -10), textcoords="offset points", size=7)
    low, high = (f(x for x, *_ in points) for f in (min, max))
    for rate in sorted({row["rate"] for row in rows if row["flops"]}):
        peak = roofs.rates[rate]
        ridge = peak / roofs.bandwidth
        xs = [low / 2, ridge, max(2 * high, 2 * ridge)]
        ys = [min(x * roofs.bandwidth, peak) / 1e12 for x in xs]
        axes.plot(xs, ys, "--", label=f"roof, {rate} GEMM")
    axes.set_xlabel("FLOPs per byte that must move")
    axes.set_ylabel("TFLOP/s")
    axes.legend()
