"""The verdicts on metrics follow their limits, in the direction in which each metric is good."""

import pytest

from fastsae.evals.verdict import LIMITS, verdict


@pytest.mark.parametrize("name", LIMITS)
def test_levels_change_at_the_limits_and_nowhere_else(name: str):
    limits = LIMITS[name]
    worse = -1e-6 if limits.above else 1e-6
    found = [
        verdict(name, value, "relu")[0]
        for value in (limits.good, limits.good + worse, limits.fair, limits.fair + worse)
    ]
    assert found == ["good", "fair", "fair", "poor"]


def test_l0_is_no_merit_where_it_was_asked_for():
    assert verdict("l0", 32.0, "topk") == ("good", "set by k")
    assert verdict("l0", 32.0, "jumprelu")[1] != "set by k"
    assert verdict("l0", 2.0, "topk")[0] == verdict("l0", 1.0, "relu")[0] == "fair"
    assert verdict("l0", 0.0, "jumprelu") == ("poor", "no latent is active on most tokens")
    assert verdict("l0", 1000.0, "topk")[0] == "poor"
