"""The race's tables in Markdown, and its picture."""

from pathlib import Path
from typing import Any

from .contender import CONTENDERS, SAME_LR

Rows = dict[str, dict[str, Any]]
"""What was found of each contender that came to the end."""


def tables(results: dict[str, Any]) -> str:
    """A table for each size and one of the training runs."""
    parts = []
    for name, found in results.items():
        rows = finished(found)
        parts.append(
            f"**{name}**: {found['tokens']} tokens per step, {found['d_in']} wide, "
            f"{found['d_sae']} latents, k = {found['k']}"
            + (f", {found['steps']} steps" if name == "training" else "")
        )
        parts.append(training_table(rows) if name == "training" else step_table(rows))
        failed = {n: one["error"] for n, one in found["contenders"].items() if n not in rows}
        notes = [f"- {n}: {why}" for n, why in (found["missing"] | failed).items()]
        parts += ["\n".join(notes)] if notes else []
    return "\n\n".join(parts)


def finished(found: dict[str, Any]) -> Rows:
    return {name: one for name, one in found["contenders"].items() if "error" not in one}


def step_table(rows: Rows) -> str:
    least = min((row["ms"]["median"] for row in rows.values()), default=0)
    lines = [
        "| | ms per step, median (least to most) | times the fastest's | tokens/s | peak MB |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        ms = "{median:.1f} ({min:.1f} to {max:.1f})".format(**row["ms"])
        times = f"{row['ms']['median'] / least:.2f}"
        lines.append(f"| {name} | {ms} | {times} | {row['tokens/s']:,} | {row['peak MB']:,} |")
    return "\n".join(lines)


def training_table(rows: Rows) -> str:
    lines = [
        "| | learning rate | warm-up steps | held-out FVU | L0 | tokens/s | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        recipe, quality = f"{row['lr']:.2g} | {row['warm-up']}", f"{row['held-out FVU']:.4f}"
        time = f"{row['tokens/s']:,} | {row['seconds']:.0f}"
        lines.append(f"| {name} | {recipe} | {quality} | {row['L0']:.1f} | {time} |")
    return "\n".join(lines)


def own_name(run: str) -> str:
    """Of the contender whose training run it is."""
    return run.removesuffix(SAME_LR)


def plot(results: dict[str, Any], path: Path) -> None:
    """Left, the speed of each contender at each size; right, FVU and time of the training runs."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    colors = {name: colormaps["tab20"](n) for n, name in enumerate(CONTENDERS)}
    figure = Figure(figsize=(12, 5), layout="constrained")
    speeds, quality = figure.subplots(1, 2)
    plot_speeds(speeds, {n: finished(f) for n, f in results.items() if n != "training"}, colors)
    for name, row in finished(results.get("training", {"contenders": {}})).items():
        own = own_name(name)
        marker = "o" if own == name else "^"
        quality.plot(row["seconds"], row["held-out FVU"], marker, color=colors[own], markersize=9)
    quality.set_xlabel("seconds of training (triangles: with fastsae's learning rate)")
    quality.set_ylabel("held-out FVU")
    quality.set_xscale("log")
    for axes in (speeds, quality):
        axes.set_yscale("log")
        axes.grid(alpha=0.3, which="both")
    swatches = [speeds.plot([], [], "s", color=color)[0] for color in colors.values()]
    figure.legend(swatches, list(colors), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=120)


def plot_speeds(axes: Any, shapes: dict[str, Rows], colors: dict[str, Any]) -> None:
    """A group of points for each size, with the spread over the rounds."""
    width = 0.8 / len(colors)
    for place, rows in enumerate(shapes.values()):
        for n, (name, color) in enumerate(colors.items()):
            if name in rows:
                ms, left = rows[name]["ms"], place + (n + 0.5) * width - 0.4
                spread = [[ms["median"] - ms["min"]], [ms["max"] - ms["median"]]]
                axes.errorbar(left, ms["median"], spread, fmt="o", color=color, markersize=7)
    axes.set_xticks(range(len(shapes)), list(shapes))
    axes.set_xlabel("size")
    axes.set_ylabel("ms per step")
