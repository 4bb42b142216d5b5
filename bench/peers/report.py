"""The race's tables in Markdown, and its plot."""

import math
from pathlib import Path
from typing import Any

from bench.record import markdown

from .contender import SAME_LR

Rows = dict[str, dict[str, Any]]
"""What was found of each contender that came to the end."""


def tables(results: dict[str, Any]) -> str:
    """A table for each size and one of the training runs."""
    parts = []
    for name, found in results.items():
        rows = finished(found)
        size = "{tokens} tokens per step, {d_in} wide, {d_sae} latents, k = {k}".format(**found)
        steps = f", {found['steps']} steps" if name == "training" else ""
        parts.append(f"**{name}**: {size}{steps}")
        parts.append(training_table(rows) if name == "training" else step_table(rows))
        failed = {n: one["error"] for n, one in found["contenders"].items() if n not in rows}
        notes = [f"- {n}: {why}" for n, why in (found["missing"] | failed).items()]
        parts += ["\n".join(notes)] if notes else []
    return "\n\n".join(parts)


def finished(found: dict[str, Any]) -> Rows:
    return {name: one for name, one in found["contenders"].items() if "error" not in one}


def step_table(rows: Rows) -> str:
    least = min((row["ms"]["median"] for row in rows.values()), default=0)
    titles = ["", "ms per step, median (min to max)", "times the fastest's", "tokens/s", "peak MB"]
    cells = []
    for name, row in rows.items():
        ms, times = "{median:.1f} ({min:.1f} to {max:.1f})", row["ms"]["median"] / least
        last = f"{row['tokens/s']:,}", f"{row['peak MB']:,}"
        cells.append([name, ms.format(**row["ms"]), f"{times:.2f}", *last])
    return markdown(titles, cells)


TRAINING = "lr", "warm-up", "held-out FVU", "L0", "tokens/s", "seconds"


def training_table(rows: Rows) -> str:
    """What a row lacks, as old results do, is NaN."""
    cells = []
    for name, row in rows.items():
        cells.append([name, *(f"{row.get(key, math.nan):.4g}" for key in TRAINING)])
    return markdown(["", *TRAINING], cells)


def plot(results: dict[str, Any], path: Path) -> None:
    """Left, the speed of each contender at each size; right, FVU and time of the training runs."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    names = (name.removesuffix(SAME_LR) for f in results.values() for name in f["contenders"])
    colors = {name: colormaps["tab20"](n) for n, name in enumerate(dict.fromkeys(names))}
    figure = Figure(figsize=(12, 5), layout="constrained")
    speeds, quality = figure.subplots(1, 2)
    plot_speeds(speeds, {n: finished(f) for n, f in results.items() if n != "training"}, colors)
    for name, row in finished(results.get("training", {"contenders": {}})).items():
        own = name.removesuffix(SAME_LR)
        marker = "o" if own == name else "^"
        quality.plot(row["seconds"], row["held-out FVU"], marker, color=colors[own], markersize=9)
    seconds = "seconds of training (triangles: with fastsae's learning rate)"
    quality.set(xlabel=seconds, ylabel="held-out FVU", xscale="log")
    for axes in (speeds, quality):
        axes.set_yscale("log")
        axes.grid(alpha=0.3, which="both")
    swatches = [speeds.plot([], [], "s", color=color)[0] for color in colors.values()]
    figure.legend(swatches, list(colors), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=120)


def plot_speeds(axes: Any, shapes: dict[str, Rows], colors: dict[str, Any]) -> None:
    """A group of points for each size, with the spread over the rounds."""
    for place, rows in enumerate(shapes.values()):
        for n, (name, color) in enumerate(colors.items()):
            if name in rows:
                ms, left = rows[name]["ms"], place + (n + 0.5) * 0.8 / len(colors) - 0.4
                axes.vlines(left, ms["min"], ms["max"], color=color)
                axes.plot(left, ms["median"], "o", color=color, markersize=7)
    axes.set_xticks(range(len(shapes)), list(shapes))
    axes.set(xlabel="size", ylabel="ms per step")
