"""Labels of points in a plot, placed so that they overlap neither each other nor points."""

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from fastsae.progress import printable

if TYPE_CHECKING:
    from matplotlib.transforms import Bbox

LONGEST, SIZE = 40, 7
"""Characters of a label, and their size in typographic points."""

FURTHEST, NEAR = 12, 1
"""Rings of places that are tried around a point, and up to which one no line leads to the label."""

POINT = 5
"""Pixels on each side of a point that labels keep away from."""


def label_points(axes: Any, points: Mapping[str, tuple[float, float, Any]]) -> None:
    """Write names next to points (x, y, color), each where there is room; a line leads from those
    that are far from their point."""
    from matplotlib.transforms import Bbox

    figure = axes.figure
    figure.draw_without_rendering()  # places the axes
    places = {
        name: tuple(axes.transData.transform(point[:2]).tolist()) for name, point in points.items()
    }
    taken = [Bbox([(x - POINT, y - POINT), (x + POINT, y + POINT)]) for x, y in places.values()]
    for name in sorted(points, key=lambda name: -places[name][1]):
        text = printable(name, LONGEST).replace("$", r"\$")
        ring, right, up, box = free_place(axes, text, places[name], taken)
        x, y, color = points[name]
        axes.annotate(
            text,
            (x, y),
            (right, up),
            textcoords="offset points",
            fontsize=SIZE,
            ha=alignment(right),
            va="center",
            color=color,
            arrowprops={"arrowstyle": "-", "lw": 0.5, "color": color} if ring > NEAR else None,
        )
        taken.append(box)


def free_place(
    axes: Any, text: str, place: tuple[float, float], taken: "list[Bbox]"
) -> "tuple[int, float, float, Bbox]":
    """The nearest offset in points, with its ring, where a label is inside the axes and overlaps
    nothing; the last one there is if there is none."""
    from matplotlib.transforms import Bbox

    sample = axes.text(0, 0, text, fontsize=SIZE)
    size, scale = sample.get_window_extent(), axes.figure.dpi / 72
    sample.remove()
    start = {"left": 0.0, "center": -size.width / 2, "right": -size.width}
    found = None
    for ring, right, up in offsets():
        left = place[0] + right * scale + start[alignment(right)]
        bottom = place[1] + up * scale - size.height / 2
        box = Bbox.from_bounds(left, bottom, size.width, size.height)
        found = ring, right, up, box
        inside = axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max)
        if inside and not any(box.overlaps(other) for other in taken):
            break
    assert found is not None, "there are offsets"
    return found


def alignment(right: float) -> str:
    """Where a label begins that is so far on the right of its point."""
    return "left" if right > 0 else "right" if right < 0 else "center"


def offsets() -> Iterator[tuple[int, float, float]]:
    """Rings of places around a point, in typographic points, those on the right first."""
    for ring in range(1, FURTHEST + 1):
        for eighth in (0, 7, 1, 6, 2, 4, 3, 5):
            angle, radius = math.pi / 4 * eighth, 9 * ring
            yield ring, round(radius * math.cos(angle), 3), round(radius * math.sin(angle), 3)
