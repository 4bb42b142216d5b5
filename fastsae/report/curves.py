"""The curves of a run, from its metrics.jsonl."""

from pathlib import Path
from typing import Any

import numpy as np

from fastsae.progress import printable
from fastsae.train.log import read_lines

from .contexts import number

CURVES = ("fvu", "l0", "dead_fraction", "downstream")
MOST_POINTS = 400


def curves_of(run: Path, name: str) -> dict[str, Any]:
    """What was logged in training and on held-out data, thinned out; no curves without a file."""
    found: dict[str, Any] = {"name": printable(name, 60)}
    lines = read_lines(run / "metrics.jsonl")
    for part, prefix in (("training", ""), ("heldout", "heldout_")):
        curves = {key: curve(lines, prefix + key) for key in CURVES}
        if curves := {key: drawn for key, drawn in curves.items() if drawn["x"]}:
            found[part] = curves
    return found


def curve(lines: list[dict[str, Any]], key: str) -> dict[str, list[Any]]:
    """The steps at which a number was logged, and the number."""
    logged = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), int | float)]
    places = np.linspace(0, len(logged) - 1, min(len(logged), MOST_POINTS)).round().astype(int)
    points = [logged[place] for place in places]
    return {"x": [step for step, _ in points], "y": [number(value) for _, value in points]}
