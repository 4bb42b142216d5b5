"""Tables in Markdown and a plot of the comparison with other trainers."""

import math
from pathlib import Path
from typing import Any

from bench.record import markdown

from .contender import SAME_LR

Rows = dict[str, dict[str, Any]]
"""Results of each contender that finished."""


def tables(results: dict[str, Any]) -> str:
    """A table of step times per shape, and one of the training runs."""
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
    titles = ["", "ms per step, median (min to max)", "relative to fastest", "tokens/s", "peak MB"]
    cells = []
    for name, row in rows.items():
        ms, times = "{median:.1f} ({min:.1f} to {max:.1f})", row["ms"]["median"] / least
        last = f"{row['tokens/s']:,}", f"{row['peak MB']:,}"
        cells.append([name, ms.format(**row["ms"]), f"{times:.2f}", *last])
    return markdown(titles, cells)


TRAINING = "lr", "warm-up", "held-out FVU", "L0", "tokens/s", "seconds"


def training_table(rows: Rows) -> str:
    """Old results lack some columns, which show as NaN."""
    cells = [[n, *(f"{row.get(key, math.nan):.4g}" for key in TRAINING)] for n, row in rows.items()]
    return markdown(["", *TRAINING], cells)


COLORS = "#0072b2", "#56b4e9", "#000000", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#999999"
"""The Okabe-Ito palette, which color-blind readers can tell apart."""


def plot(results: dict[str, Any], path: Path) -> None:
    """Plot step time per shape (left), and FVU against time of the training runs (right)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.2), layout="constrained")
    speeds, quality = figure.subplots(1, 2, width_ratios=(5, 4))
    names = dict.fromkeys(plain(name) for found in results.values() for name in finished(found))
    colors: dict[str, str] = dict(zip(names, COLORS, strict=False))
    sizes = [found for name, found in results.items() if name != "training"]
    for place, found in enumerate(sizes):
        for name, row in finished(found).items():
            left = (list(colors).index(plain(name)) + 0.5) * 0.8 / len(colors) - 0.4
            point(speeds, name, colors, place + left, row["ms"]["median"])
    for name, row in finished(results.get("training", {"contenders": {}})).items():
        point(quality, name, colors, row["seconds"], row["held-out FVU"])
    labels = ["{tokens} x {d_in}\n{d_sae} latents".format(**found) for found in sizes]
    speeds.set_xticks(range(len(sizes)), labels, fontsize="small")
    speeds.set(xlabel="tokens x d_in, latents", ylabel="time per training step (ms)", yscale="log")
    speeds.yaxis.set_major_formatter("{x:,g}")
    quality.set(xlabel="training time (s)", ylabel="held-out fraction of variance unexplained")
    figure.suptitle("Hollow: fastsae.accelerate. Triangle: fastsae's learning rate. Square: Adam.")
    swatches = [speeds.plot([], [], "s", color=color)[0] for color in colors.values()]
    figure.legend(swatches, list(colors), loc="outside lower center", ncols=6)
    figure.savefig(path, dpi=120)


def plain(name: str) -> str:
    """The trainer's name without its variant: trainers share a color, variants have markers."""
    return name.removesuffix(SAME_LR).removesuffix(", Adam").removesuffix(", accelerated")


def point(axes: Any, name: str, colors: dict[str, str], x: float, y: float) -> None:
    """Plot one contender; its marker shows the variant."""
    marker = "^" if name.endswith(SAME_LR) else "s" if name.endswith(", Adam") else "o"
    style = {"fillstyle": "none" if name.endswith(", accelerated") else "full", "mew": 2}
    axes.plot(x, y, marker, color=colors[plain(name)], markersize=8, **style)
    axes.grid(visible=True, alpha=0.3)
