"""Labels of points in a plot, placed so that they overlap neither each other nor points."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from fastsae.progress import printable

LONGEST = 40
"""Characters of a label."""

FURTHEST = 12
"""Rings of places that are tried around a point."""


def label_points(axes: Any, points: Mapping[str, tuple[float, float, Any]]) -> None:
    """Write names next to points (x, y, color), each where there is room; a line leads from those
    that are far from their point."""
    from matplotlib.transforms import Bbox

    figure = axes.figure
    figure.draw_without_rendering()  # places the axes
    places = {name: axes.transData.transform(point[:2]) for name, point in points.items()}
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in places.values()]
    for name in sorted(points, key=lambda name: -places[name][1]):
        x, y, color = points[name]
        label = None
        for number, (right, up) in enumerate(offsets()):
            if label is not None:
                label.remove()
            label = axes.annotate(
                printable(name, LONGEST).replace("$", r"\$"),
                (x, y),
                (right, up),
                textcoords="offset points",
                fontsize=7,
                ha="left" if right > 0 else "right" if right < 0 else "center",
                va="center",
                color=color,
                arrowprops={"arrowstyle": "-", "lw": 0.5, "color": color} if number > 7 else None,
            )
            box = label.get_window_extent().padded(1)
            inside = axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max)
            if inside and not any(box.overlaps(other) for other in taken):
                break
        assert label is not None
        taken.append(label.get_window_extent())


def offsets() -> Iterator[tuple[float, float]]:
    """Places around a point in typographic points, the nearest and those on the right first."""
    for ring in range(1, FURTHEST + 1):
        for eighth in (0, 7, 1, 6, 2, 4, 3, 5):
            angle = math.pi / 4 * eighth
            yield round(9 * ring * math.cos(angle), 3), round(9 * ring * math.sin(angle), 3)
