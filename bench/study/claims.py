"""What the papers claim, and whether it held here: paired by seed, data and order of batches."""

from statistics import mean
from typing import Any, NamedTuple

Runs = dict[str, dict[str, dict[str, Any]]]
"""The results of one data set: by method, by seed."""


class Claim(NamedTuple):
    """A statement that one method's figure is better than another's."""

    paper: str
    text: str
    method: str
    other: str
    figure: str
    higher: bool
    """Whether more is better."""


CLAIMS = (
    Claim(
        "AbsTopK, arXiv:2510.00404",
        "lower error than TopK at equal k",
        *("AbsTopK", "TopK", "fvu", False),
    ),
    Claim(
        "RT-TopKSAE (rotation trick, arXiv:2410.06424)",
        "all latents are used, where plain TopK leaves half of them dead (dense)",
        *("RT dense", "TopK, no aux-k", "dead", False),
    ),
    Claim("", "the same (support)", "RT support", "TopK, no aux-k", "dead", False),
    Claim("", "40 % better retention of principal components (dense)",
          "RT dense", "TopK, no aux-k", "pcr", True),
    Claim("", "the same (support)", "RT support", "TopK, no aux-k", "pcr", True),
    *(
        Claim(
            "RSAE, arXiv:2606.14990" if teacher == "ReLU" else "",
            f"a rational {teacher} has a lower error than the {teacher} tuned for as long",
            *(f"RSAE of {teacher}", f"{teacher}, tuned", "fvu", False),
        )
        for teacher in ("ReLU", "JumpReLU", "TopK")
    ),
    Claim("vSAE, arXiv:2509.22994", "falls short of TopK",
          "vSAE", "TopK, no aux-k", "fvu", True),
    Claim("", "the same (learned variance)",
          "vSAE, learned variance", "TopK, no aux-k", "fvu", True),
)  # fmt: skip


def value(run: dict[str, Any], figure: str) -> float:
    """A figure of a run; pcr is the mean of the three ranks' retention."""
    if figure == "pcr":
        return mean(v for name, v in run.items() if name.startswith("pcr"))
    return run[figure]


def verdict(claim: Claim, runs: Runs) -> str | None:
    """What was measured on one data set; None where a method is missing."""
    own, other = runs.get(claim.method, {}), runs.get(claim.other, {})
    pairs = [
        (value(own[seed], claim.figure), value(other[seed], claim.figure))
        for seed in sorted(own.keys() & other.keys())
    ]
    if not pairs:
        return None
    better = sum((a > b) if claim.higher else (a < b) for a, b in pairs)
    figures = f"{mean(a for a, _ in pairs):.4f} against {mean(b for _, b in pairs):.4f}"
    held = {len(pairs): "held", 0: "did not hold"}.get(better, "undecided")
    return f"{held}: {figures}, in {better} of {len(pairs)} seeds"


def claims_table(data: dict[str, Runs]) -> str:
    """A line for each claim, a column for each data set, in Markdown."""
    lines = [
        "| paper | claim | " + " | ".join(data) + " |",
        "|---|---|" + "---|" * len(data),
    ]
    for claim in CLAIMS:
        found = [verdict(claim, runs) or "–" for runs in data.values()]
        lines.append(f"| {claim.paper} | {claim.text} | " + " | ".join(found) + " |")
    return "\n".join(lines)
