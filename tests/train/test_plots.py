"""Plots read well: plain ticks, no flat panels, labels that do not overlap."""

import itertools

import pytest

from fastsae.train.curves import is_flat, plain_log_ticks
from fastsae.train.labels import label_points

pytest.importorskip("matplotlib")


def test_ticks_are_plain_numbers():
    from matplotlib.figure import Figure

    for low, high in ((0.0886, 0.41), (0.003, 3.0), (0.11, 0.13)):
        figure = Figure()
        axes = figure.subplots()
        axes.plot([0, 1], [high, low])
        plain_log_ticks(axes.yaxis)
        figure.draw_without_rendering()
        bottom, top = axes.get_ylim()
        shown = [
            label.get_text()
            for label, place in zip(axes.get_yticklabels(), axes.get_yticks(), strict=True)
            if bottom <= place <= top and label.get_text()
        ]
        assert len(shown) >= 2 and all(bottom <= float(text) <= top for text in shown)


def test_what_is_flat():
    assert is_flat("l0", [32.0, 32.0]) and is_flat("tokens_per_second", [95.0, 100.0])
    assert is_flat("dead_fraction", [0.0, 0.001]) and not is_flat("dead_fraction", [0.0, 0.02])
    assert not is_flat("l0", [10.0, 100.0])


def test_labels_overlap_neither_each_other_nor_points():
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    figure = Figure(figsize=(5, 4))
    axes = figure.subplots()
    axes.margins(0.25)
    points = {f"topk-k=32-seed{n}": (32.0, 0.1 + 0.001 * n, "black") for n in range(6)}
    points |= {f"jumprelu-{n}": (40.0 + n, 0.2, "black") for n in range(3)}
    for x, y, _ in points.values():
        axes.scatter(x, y)
    label_points(axes, points)
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without lines to points
    assert len(boxes) == len(points)
    assert not any(one.overlaps(two) for one, two in itertools.combinations(boxes, 2))
    places = [axes.transData.transform(point[:2]) for point in points.values()]
    assert not any(box.contains(*place) for box in boxes for place in places)
