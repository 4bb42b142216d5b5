"""Tables in Markdown and plots of the comparison with other trainers."""

import math
from collections.abc import Iterable
from itertools import cycle
from pathlib import Path
from typing import Any

from bench.record import markdown

from .training import FEW, FVU, NEVER, averaged, best, curve_of

TRAINING = "training"
"""The first word of results that are training runs."""

FAST = ", accelerated"
"""Ends the name of a contender with fastsae's layers in its library's trainer."""

ADAM = ", Adam"
"""In the names of contenders with another optimizer than their library's default."""

Rows = dict[str, dict[str, Any]]
"""Results of each contender that finished."""

Points = list[dict[str, Any]]
"""What was measured after some step, to be plotted."""


def tables(results: dict[str, Any]) -> str:
    """A table of step times per shape, and one of the training runs per data set and length."""
    parts = []
    for name, found in results.items():
        size = "{tokens} tokens per step, {d_in} wide, {d_sae} latents, k = {k}".format(**found)
        if name.startswith(TRAINING):
            failed = {}
            for steps, rows in training_rows(found).items():
                runs = found["runs"][steps]
                parts += [f"**{name}**: {size}, {steps} steps", training_table(rows)]
                parts += ["FVU / never active by learning rate, first seed:", rates_table(runs)]
                errors = ((n, one["error"]) for n in runs for one in runs[n] if "error" in one)
                failed |= dict(errors)
        else:
            rows = finished(found)
            parts += [f"**{name}**: {size}", step_table(rows)]
            failed = {n: one["error"] for n, one in found["contenders"].items() if n not in rows}
        notes = [f"- {n}: {why}" for n, why in (found["missing"] | failed).items()]
        parts += ["\n".join(notes)] if notes else []
    return "\n\n".join(parts)


def finished(found: dict[str, Any]) -> Rows:
    timed = found.get("contenders", {})
    return {name: one for name, one in timed.items() if "error" not in one}


def training_rows(found: dict[str, Any]) -> dict[str, Rows]:
    """Results of the contenders at their best learning rates, by number of steps.

    Seconds are those of steps that were timed in turns: runs follow each other, so other load on
    the machine would be taken for differences between contenders. Without such times they are NaN.
    """
    timed = {n: row["ms"]["median"] / 1e3 for n, row in finished(found).items()}
    results: dict[str, Rows] = {}
    for steps, contenders in found["runs"].items():
        rows = {name: averaged(runs) for name, runs in contenders.items() if best(runs)}
        stand_in = {name: rows[other] for name in timed if (other := f"{name}{FAST}") in rows}
        rows = stand_in | rows
        results[steps] = {
            name: row | {"seconds": int(steps) * timed.get(name, math.nan)}
            for name, row in rows.items()
        }
    return results


def step_table(rows: Rows) -> str:
    least = min((row["ms"]["median"] for row in rows.values()), default=0)
    titles = ["", "ms per step, median (min to max)", "relative to fastest", "tokens/s", "peak MB"]
    cells = []
    for name, row in rows.items():
        ms, times = "{median:.1f} ({min:.1f} to {max:.1f})", row["ms"]["median"] / least
        last = f"{row['tokens/s']:,}", f"{row['peak MB']:,}"
        cells.append([name, ms.format(**row["ms"]), f"{times:.2f}", *last])
    return markdown(titles, cells)


def training_table(rows: Rows) -> str:
    """Old results lack some columns, which show as NaN; without any seconds, there is no column."""
    titles = ["", "best learning rate", "held-out FVU", "over seeds", "never active"]
    titles += [f"FVU with at most {FEW:.0%} never active", *["seconds"] * has_seconds(rows)]
    cells = []
    for name, row in rows.items():
        spread = f"{row['lowest']:.4f} to {row['highest']:.4f} ({row['seeds']})"
        numbers = f"{row[FVU]:.4f}", spread, f"{row.get(NEVER, math.nan):.2%}"
        last = f"{row['alive']:.4f}", *[f"{row['seconds']:.0f}"] * has_seconds(rows)
        cells.append([name, row.get("lr", math.nan), *numbers, *last])
    return markdown(titles, cells)


def has_seconds(rows: Rows) -> bool:
    return any(math.isfinite(row["seconds"]) for row in rows.values())


def rates_table(contenders: dict[str, list[dict[str, Any]]]) -> str:
    """The grid, which shows whether the best learning rate is inside it."""
    rates = sorted({run["lr"] for runs in contenders.values() for run in runs if "lr" in run})
    cells = [[name, *(cell(runs, rate) for rate in rates)] for name, runs in contenders.items()]
    return markdown(["", *rates], cells)


def cell(runs: list[dict[str, Any]], lr: float) -> str:
    """What the first seed gave with a learning rate."""
    for run in runs:
        if run.get("lr") == lr and run["seed"] == 0:
            return f"{run[FVU]:.4f} / {run.get(NEVER, math.nan):.2%}"
    return "–"


COLORS = "#0072b2", "#56b4e9", "#000000", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#999999"
"""The Okabe-Ito palette, which color-blind readers can tell apart."""


def plot(results: dict[str, Any], path: Path) -> None:
    """Plot step times to PATH with .png, and each data set's training runs to a file of its name.

    In training plots, markers are finished runs at the best rate. Lines are the curves of the
    longest runs; dotted lines connect them with their markers. Many trainers' learning rate decays
    at the end of a run, so points of a curve are not what shorter finished runs would reach.
    """
    from matplotlib.figure import Figure

    sizes = [found for name, found in results.items() if not name.startswith(TRAINING)]
    if sizes:
        figure = Figure(figsize=(7, 4.6), layout="constrained")
        plot_steps(figure, sizes)
        figure.savefig(path.with_suffix(".png"), dpi=120)
    for name, found in results.items():
        if name.startswith(TRAINING):
            figure = Figure(figsize=(11, 4.6), layout="constrained")
            plot_training(figure, found)
            suffix = name.replace(", ", "-").replace(" ", "-")
            figure.savefig(path.with_name(f"{path.stem}-{suffix}.png"), dpi=120)


def plot_steps(figure: Any, sizes: list[dict[str, Any]]) -> None:
    axes = figure.subplots()
    names = [name for found in sizes for name in finished(found)]
    colors = colors_of(names)
    for place, found in enumerate(sizes):
        for name, row in finished(found).items():
            left = (list(colors).index(plain(name)) + 0.5) * 0.8 / len(colors) - 0.4
            axes.plot(place + left, row["ms"]["median"], **style(name, colors))
    labels = ["{tokens} x {d_in}\n{d_sae} latents".format(**found) for found in sizes]
    axes.set_xticks(range(len(sizes)), labels, fontsize="small")
    axes.set(xlabel="tokens x d_in, latents", ylabel="time per training step (ms)", yscale="log")
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.grid(visible=True, alpha=0.3)
    legend(figure, names, 3)


def plot_training(figure: Any, found: dict[str, Any]) -> None:
    from matplotlib.ticker import LogLocator, PercentFormatter

    rows = training_rows(found)
    names = list(dict.fromkeys(name for one in rows.values() for name in one))
    colors = colors_of(names)
    panels = [("million tokens", FVU), ("seconds", FVU), ("million tokens", NEVER)]
    if not any(map(has_seconds, rows.values())):
        del panels[1]
    for axes, (x, y) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        axes.set(xlabel=x, ylabel=y, xscale="log")
        if y == NEVER:
            axes.set(ylabel=f"latents {y}")
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.grid(visible=True, which="both", alpha=0.3)
    for name in names:
        during, finished = points(found, rows, name)
        marked = style(name, colors)
        line, dots = ({"color": marked["color"], "linestyle": kind} for kind in "-:")
        drawn = [(finished, marked)]
        if during:
            drawn += [(during, line), ([during[-1], finished[-1]], dots)]
            figure.suptitle(LINES, fontsize="small")
        for axes, (x, y) in zip(figure.axes, panels, strict=True):
            for some, look in drawn:
                axes.plot(*([row.get(key, math.nan) for row in some] for key in (x, y)), **look)
    legend(figure, names, 6)


LINES = (
    "markers: finished runs; lines: during the longest run, whose learning rate has not fully "
    "decayed (dotted: up to its end)"
)


def points(found: dict[str, Any], rows: dict[str, Rows], name: str) -> tuple[Points, Points]:
    """A contender's curve before the end of its longest run, and its finished runs in order of
    length; both with the tokens and seconds after which they were measured."""
    own = [one[name] | {"step": int(steps)} for steps, one in rows.items() if name in one]
    own.sort(key=lambda row: row["step"])
    longest = own[-1]["step"]
    runs = found["runs"][str(longest)]
    curve = curve_of(runs.get(name) or runs[f"{name}{FAST}"])
    million, seconds = found["tokens"] / 1e6, own[-1]["seconds"] / longest

    def placed(row: dict[str, Any]) -> dict[str, Any]:
        return row | {"million tokens": row["step"] * million, "seconds": row["step"] * seconds}

    return [placed(row) for row in curve if row["step"] < longest], [*map(placed, own)]


def legend(figure: Any, names: list[str], columns: int) -> None:
    """The trainers' colors, and what the markers of their variants mean."""
    from matplotlib.lines import Line2D

    colors = colors_of(names)
    dots = [Line2D([], [], marker="o", linestyle="", color=color) for color in colors.values()]
    meanings = {"hollow: fastsae.accelerate": accelerated, "squares: Adam": with_adam}
    title = "; ".join(text for text, test in meanings.items() if any(map(test, names)))
    figure.legend(
        dots, list(colors), loc="outside lower center", ncols=columns, title=title or None
    )


def colors_of(names: Iterable[str]) -> dict[str, str]:
    """A color for each trainer."""
    return dict(zip(dict.fromkeys(map(plain, names)), cycle(COLORS), strict=False))


def plain(name: str) -> str:
    """The trainer's name without its variant: trainers share a color, variants have markers."""
    return name.removesuffix(FAST).removesuffix(ADAM)


def accelerated(name: str) -> bool:
    return name.endswith(FAST)


def with_adam(name: str) -> bool:
    return name.removesuffix(FAST).endswith(ADAM)


def style(name: str, colors: dict[str, str]) -> dict[str, Any]:
    """How a contender is drawn; its marker shows the variant."""
    return {
        "marker": "s" if with_adam(name) else "o",
        "linestyle": "",
        "color": colors[plain(name)],
        "fillstyle": "none" if accelerated(name) else "full",
        "markersize": 8,
        "markeredgewidth": 2,
    }
