"""What the papers claim, and whether it held here: paired by seed, data and order of batches."""

from statistics import mean
from typing import Any, NamedTuple

from bench.record import markdown

Runs = dict[str, dict[str, dict[str, Any]]]
"""The results of one data set: by method, by seed."""


L0_APART = 0.02
"""Part by which the L0 of two methods may differ."""


class Claim(NamedTuple):
    """A statement that one method's metric is higher, or lower, than another's."""

    paper: str
    text: str
    method: str
    other: str
    metric: str
    higher: bool
    """Whether it is claimed to be the higher one."""


RT, VSAE = "RT-TopKSAE (rotation trick, arXiv:2410.06424)", "vSAE, arXiv:2509.22994"
FEWER = "fewer dead latents than plain TopK; the paper has none against 53 % (dense)"
BETTER = "better retention of principal components; the paper has 40 % (dense)"
TUNED = "a rational {0} has a lower error than the {0} tuned for as long"
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
    """What was measured on one data set; None where a method is missing.

    A claim holds where it is so from every seed, by however little: the change is given. Where L0
    differs by more than L0_APART, the two are not compared, unless the one of the better metric
    also has fewer active latents.
    """
    own, other = runs.get(claim.method, {}), runs.get(claim.other, {})
    seeds = sorted(own.keys() & other.keys())
    if not seeds:
        return None
    ours, theirs = ([value(runs[s], claim.metric) for s in seeds] for runs in (own, other))
    sign = 1 if claim.higher else -1
    so = sum(sign * (a - b) > 0 for a, b in zip(ours, theirs, strict=True))
    contrary = sum(sign * (a - b) < 0 for a, b in zip(ours, theirs, strict=True))
    change = f" ({mean(ours) / mean(theirs) - 1:+.1%})" if mean(theirs) else ""
    numbers = f"{mean(ours):.4f} against {mean(theirs):.4f}{change}, as claimed in {so}"
    numbers += f" of {len(seeds)}"
    l0, their_l0 = (mean(runs[s]["l0"] for s in seeds) for runs in (own, other))
    whole = {so: "held", contrary: "did not hold"}.get(len(seeds), "undecided")
    if abs(l0 / their_l0 - 1) > L0_APART:
        numbers = f"L0 {l0:.1f} against {their_l0:.1f}, {numbers}"
        more_is_good = claim.metric == "pcr"
        ours_is_good = (whole == "held") == (claim.higher == more_is_good)
        if whole == "undecided" or ours_is_good != (l0 < their_l0):
            return f"not comparable: {numbers}"
    return f"{whole}: {numbers}"


def claims_table(data: dict[str, Runs]) -> str:
    """A line for each claim, a column for each data set, in Markdown."""
    rows = ([c.paper, c.text, *(verdict(c, runs) or "–" for runs in data.values())] for c in CLAIMS)
    return markdown(["paper", "claim", *data], rows)
