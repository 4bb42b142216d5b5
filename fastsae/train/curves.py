"""Plots a run's metrics."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

PANELS = {
    "fvu": "fraction of variance unexplained",
    "dead_fraction": "dead latents",
    "l0": "active latents per token",
    "tokens_per_second": "tokens per second",
}
"""The first one is always plotted, others if they are not flat."""

FLAT = 0.1
"""A curve is flat if its values differ by less than this part of the largest one,"""

LEAST = {"dead_fraction": 0.005}
"""or by less than this, where small values differ by more than they mean."""

AT_END = ":", "tab:gray"
"""Style of the saved SAE's held-out value."""


def plot_curves(
    lines: Sequence[Mapping[str, Any]],
    path: Path,
    title: str,
    heldout: Mapping[str, float] = MappingProxyType({}),
) -> bool:
    """Plot the lines of metrics.jsonl to a PNG, with values on held-out data: those during
    training, and those of the saved SAE. False without matplotlib or lines."""
    if not lines or importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    first, *others = PANELS
    shown = [
        first,
        *(name for name in others if not is_flat(name, values_of(name, lines, heldout))),
    ]
    figure = Figure(figsize=(4.5 * len(shown), 3.8), layout="constrained")
    figure.suptitle(title.replace("$", r"\$"), fontsize=9)
    for axes, name in zip(figure.subplots(1, len(shown), squeeze=False).flat, shown, strict=True):
        plot_panel(axes, lines, name, heldout.get(name))
    figure.savefig(path, dpi=120)
    return True


def values_of(
    name: str, lines: Sequence[Mapping[str, Any]], heldout: Mapping[str, float]
) -> list[float]:
    """All values of a metric that a panel shows."""
    found = [line[key] for key in (name, f"heldout_{name}") for line in lines if key in line]
    return [*found, heldout[name]] if name in heldout else found


def is_flat(name: str, values: Sequence[float]) -> bool:
    """Whether there is nothing to see in a metric's curve."""
    return max(values) - min(values) <= max(FLAT * max(map(abs, values)), LEAST.get(name, 0.0))


def plot_panel(
    axes: Any, lines: Sequence[Mapping[str, Any]], name: str, at_end: float | None
) -> None:
    """One metric over the steps."""
    from matplotlib.ticker import PercentFormatter

    steps = [line["step"] for line in lines]
    axes.plot(steps, [line[name] for line in lines], linewidth=1.2, label="training")
    evaluated = [line for line in lines if f"heldout_{name}" in line]
    if evaluated:
        x, y = ([line[key] for line in evaluated] for key in ("step", f"heldout_{name}"))
        axes.plot(x, y, "o-", markersize=3, linewidth=1.2, label="held-out")
    if at_end is not None:
        style, color = AT_END
        shown = f"{at_end:.2%}" if name == "dead_fraction" else f"{at_end:.4g}"
        axes.axhline(at_end, linestyle=style, color=color, label=f"saved SAE, held-out: {shown}")
    if evaluated or at_end is not None:
        axes.legend(fontsize=8)
    axes.set_title(PANELS[name], fontsize=10)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    if name == "fvu":
        plain_log_ticks(axes.yaxis)
    elif name == "dead_fraction":
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_ylim(bottom=0)
    else:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter("{x:,.0f}")


def plain_log_ticks(axis: Any) -> None:
    """A logarithmic scale whose ticks are plain numbers: 0.1, 0.2, 0.5 instead of powers of 10."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if axis.axis_name == "y":
        axis.axes.set_yscale("log")
    else:
        axis.axes.set_xscale("log")
    low, high = sorted(axis.get_view_interval())
    subs = (1, 2, 5) if high > 8 * low else (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)
    axis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
