"""The study's verdicts, on results that are made up."""

import pytest

from bench.study.claims import Claim, verdict
from bench.study.report import report

LOWER = Claim("paper", "less", "new", "old", "fvu", False)


def results(fvu: list[float], l0: float = 32.0) -> dict:
    stamp = {"cpu": "none", "threads": 1, "torch": "0", "commit": "0"}
    shared = {"l0": l0, "dead": 0.0, "curve": [[1, 1.0], [2, 0.5]], "stamp": stamp}
    return {
        str(seed): {"fvu": value, "pcr16": 1 - value, **shared} for seed, value in enumerate(fvu)
    }


@pytest.mark.parametrize(
    ("new", "old", "expected"),
    [
        ([0.1, 0.1], [0.2, 0.2], "held: 0.1000 vs. 0.2000 (-50.0%), as claimed in 2 of 2 seeds"),
        (
            [0.3, 0.3],
            [0.2, 0.2],
            "did not hold: 0.3000 vs. 0.2000 (+50.0%), as claimed in 0 of 2 seeds",
        ),
        ([0.1, 0.3], [0.2, 0.2], "mixed: 0.2000 vs. 0.2000 (+0.0%), as claimed in 1 of 2 seeds"),
        ([0.2, 0.2], [0.2, 0.2], "mixed: 0.2000 vs. 0.2000 (+0.0%), as claimed in 0 of 2 seeds"),
        ([0.0], [0.0], "mixed: 0.0000 vs. 0.0000, as claimed in 0 of 1 seeds"),
    ],
)
def test_a_verdict(new, old, expected):
    assert verdict(LOWER, {"new": results(new), "old": results(old)}) == expected


def test_what_cannot_be_compared():
    runs = {"new": results([0.1], l0=60.0), "old": results([0.2])}
    found = verdict(LOWER, runs)
    assert found and found.startswith("not comparable: L0 60.0 vs. 32.0, 0.1")
    fewer = {"new": results([0.1], l0=20.0), "old": results([0.2])}
    found = verdict(LOWER, fewer)
    assert found and found.startswith("held: L0 20.0 vs. 32.0"), "as claimed in both"
    assert verdict(LOWER, {"new": results([0.1])}) is None


def test_a_report(tmp_path):
    runs = {"TopK": results([0.2, 0.3]), "AbsTopK": results([0.1, 0.2])}
    scale = {"steps": 2, "batch_size": 8, "tune_steps": 1}
    times = {m: {"median": t, "min": t, "max": t} for m, t in {"TopK": 2.0, "AbsTopK": 3.0}.items()}
    time = {"data": "planted", "methods": times, "stamp": {"cpu": "none", "threads": 1}}
    text = report({"scale": scale, "runs": {"planted": runs}, "time": time}, tmp_path)
    assert "| AbsTopK | 3.0 (3.0 to 3.0) | 1.50 |" in text
    assert "| TopK | 0.2500 ± 0.0707 |" in text
    assert "held: 0.1500 vs. 0.2500 (-40.0%), as claimed in 2 of 2 seeds" in text
    assert (tmp_path / "planted.png").read_bytes().startswith(b"\x89PNG")
