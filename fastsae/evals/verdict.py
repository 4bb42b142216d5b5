"""What values of an SAE's metrics are good, fair or poor: the limits, in one place.

They are rules of thumb for SAEs on a language model's activations, not laws. The lower limit is
what good published SAEs reach, the upper one what published SAEs that were found useful still had.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

Level = Literal["good", "fair", "poor"]

FIXED_L0 = "topk", "abstopk", "batchtopk", "batchabstopk", "variational"
"""Activations whose L0 is the k that was asked for."""


class Limits(NamedTuple):
    """A metric is good up to one value, fair up to another; both are from below where `above`."""

    title: str
    good: float
    fair: float
    sentences: tuple[str, str, str]
    """What a good, a fair and a poor value mean."""
    above: bool = False


# FVU: "Scaling Monosemanticity" (Templeton et al., 2024) reports at least 65 % of the variance
# explained; SAEBench (arXiv:2503.09532) and Gemma Scope (arXiv:2408.05147) have 75 to 90 % at an L0
# of 50 to 100.
# L0: "Scaling Monosemanticity" has fewer than 300 active latents per token, Gemma Scope's canonical
# SAEs about 100; below 10, latents mix what is correlated (arXiv:2508.16560).
# dead: 7 % of 16 million latents in arXiv:2406.04093; in "Scaling Monosemanticity", 35 % of 4
# million.
# recovered, of the damage of zero ablation: 94.5 % of the loss in "Towards Monosemanticity"
# (Bricken et al., 2023) for its larger dictionary, 79 % for its smaller one.
# dense, of latents that are active for over 10 % of tokens: our choice; arXiv:2407.14435 compares
# methods by them.
LIMITS: dict[str, Limits] = {
    "fvu": Limits(
        "FVU",
        0.2,
        0.35,
        (
            "most of the variance is explained",
            "usable; train longer, or use more latents or a larger k",
            "much of the variance is missing: train longer, or raise k or --d-sae",
        ),
    ),
    "l0": Limits(
        "L0",
        100,
        300,
        (
            "sparse enough to read",
            "many latents per token are harder to interpret",
            "too dense to interpret: lower k, or raise the penalty",
        ),
    ),
    "dead_fraction": Limits(
        "dead",
        0.07,
        0.35,
        (
            "few latents are wasted",
            "part of the dictionary is wasted: train longer, or with fewer latents",
            "much of the dictionary is wasted: train longer or lower --lr, with fewer latents",
        ),
    ),
    "dense_fraction": Limits(
        "dense",
        0.01,
        0.05,
        (
            "few latents are active on more than 10% of tokens",
            "some latents are active on more than 10% of tokens and hard to interpret",
            "many latents are active on more than 10% of tokens: lower k, or raise the penalty",
        ),
    ),
    "recovered_zero": Limits(
        "recovered",
        0.945,
        0.79,
        (
            "the model works nearly as well with the SAE spliced in",
            "the model loses some of its ability with the SAE spliced in",
            "the model works much worse with the SAE spliced in",
        ),
        above=True,
    ),
}
"""The metrics that there is a verdict on, by their name in summary.json and eval.json."""

SPARSEST = 10
"""L0 below which latents mix correlated features."""


def verdict(name: str, value: int | float, activation: str) -> tuple[Level, str]:
    """How good a metric is for an SAE of this activation, and in a few words why.

    Args:
        name: one of LIMITS.
        value: of the metric, on data that the SAE was not trained on.
        activation: name of the activation, as in `--activation`.
    """
    _, good, fair, sentences, above = LIMITS[name]
    if name == "l0" and value < 1:
        return "poor", "no latent is active on most tokens"
    if name == "l0" and value < SPARSEST:
        return "fair", "very sparse: latents may mix features that occur together"
    if name == "l0" and activation in FIXED_L0 and value <= good:
        return "good", "set by k"
    distance = -value if above else value
    levels: tuple[Level, Level, Level] = ("good", "fair", "poor")
    rank = sum(distance > (-limit if above else limit) for limit in (good, fair))
    return levels[rank], sentences[rank]


def remarks(values: Mapping[str, Any], activation: str) -> list[str]:
    """A line on each metric, among those that there is a verdict on, that is fair or poor."""
    found = []
    for name, value in values.items():
        if name in LIMITS and value is not None:
            level, sentence = verdict(name, value, activation)
            if level != "good":
                found.append(f"{LIMITS[name].title} is {level}: {sentence}")
    return found
