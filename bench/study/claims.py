"""Checks claims of the papers: methods are compared on the same seed, data and batch order."""

from statistics import mean
from typing import Any, NamedTuple

from bench.record import markdown

Runs = dict[str, dict[str, dict[str, Any]]]
"""Results of one data set, by method and seed."""

L0_TOLERANCE = 0.02
"""Relative difference up to which two methods' L0 count as equal."""


class Claim(NamedTuple):
    """A statement that one method's metric is higher, or lower, than another's."""

    paper: str
    text: str
    method: str
    other: str
    metric: str
    higher: bool
    """Whether the paper claims that `method` has the higher value."""


RT, VSAE = "RT-TopKSAE (rotation trick, arXiv:2410.06424)", "vSAE, arXiv:2509.22994"
FEWER = "fewer dead latents than plain TopK; the paper has none against 53 % (dense)"
BETTER = "better retention of principal components; the paper has 40 % (dense)"
TUNED = "a rational {0} has a lower error than the {0} fine-tuned for the same steps"
PLAIN = "TopK, no aux-k"

CLAIMS = (
    Claim("AbsTopK, arXiv:2510.00404", "lower error than TopK at equal k",
          "AbsTopK", "TopK", "fvu", False),
    Claim(RT, FEWER, "RT dense", PLAIN, "dead", False),
    Claim("", "the same (support)", "RT support", PLAIN, "dead", False),
    Claim("", BETTER, "RT dense", PLAIN, "pcr", True),
    Claim("", "the same (support)", "RT support", PLAIN, "pcr", True),
    Claim("RSAE, arXiv:2606.14990", TUNED.format("ReLU"),
          "RSAE of ReLU", "ReLU, tuned", "fvu", False),
    Claim("", TUNED.format("JumpReLU"), "RSAE of JumpReLU", "JumpReLU, tuned", "fvu", False),
    Claim("", TUNED.format("TopK"), "RSAE of TopK", "TopK, tuned", "fvu", False),
    Claim(VSAE, "falls short of TopK", "vSAE", PLAIN, "fvu", True),
    Claim("", "the same (learned variance)", "vSAE, learned variance", PLAIN, "fvu", True),
)  # fmt: skip


def value(run: dict[str, Any], metric: str) -> float:
    """A metric of a run; pcr is the mean of the three ranks' retention."""
    if metric == "pcr":
        return mean(v for name, v in run.items() if name.startswith("pcr"))
    return run[metric]


def verdict(claim: Claim, runs: Runs) -> str | None:
    """Whether a claim held on one data set, with the numbers; None if a method is missing.

    A claim holds if it is true of every seed, by any margin. If L0 differs by more than
    L0_TOLERANCE, two methods are comparable only if the better one has fewer active latents.
    """
    own, other = runs.get(claim.method, {}), runs.get(claim.other, {})
    seeds = sorted(own.keys() & other.keys())
    if not seeds:
        return None
    ours, theirs = ([value(runs[s], claim.metric) for s in seeds] for runs in (own, other))
    sign = 1 if claim.higher else -1
    agree = sum(sign * (a - b) > 0 for a, b in zip(ours, theirs, strict=True))
    disagree = sum(sign * (a - b) < 0 for a, b in zip(ours, theirs, strict=True))
    change = f" ({mean(ours) / mean(theirs) - 1:+.1%})" if mean(theirs) else ""
    numbers = f"{mean(ours):.4f} vs. {mean(theirs):.4f}{change}"
    numbers += f", as claimed in {agree} of {len(seeds)} seeds"
    l0, their_l0 = (mean(runs[s]["l0"] for s in seeds) for runs in (own, other))
    result = {agree: "held", disagree: "did not hold"}.get(len(seeds), "mixed")
    if abs(l0 / their_l0 - 1) > L0_TOLERANCE:
        numbers = f"L0 {l0:.1f} vs. {their_l0:.1f}, {numbers}"
        higher_is_better = claim.metric == "pcr"
        ours_is_better = (result == "held") == (claim.higher == higher_is_better)
        if result == "mixed" or ours_is_better != (l0 < their_l0):
            return f"not comparable: {numbers}"
    return f"{result}: {numbers}"


def claims_table(data: dict[str, Runs]) -> str:
    """A Markdown table of all claims, with a column per data set."""
    rows = ([c.paper, c.text, *(verdict(c, runs) or "–" for runs in data.values())] for c in CLAIMS)
    return markdown(["paper", "claim", *data], rows)
