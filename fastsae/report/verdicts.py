"""The head of a report: a few numbers, whether they are good, and what is good."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from fastsae.evals.reconstruction import Reconstruction
from fastsae.files import shown
from fastsae.nn import SAE
from fastsae.train.run_folder import weights_digest
from fastsae.train.summary import read_results

Grade = Literal["good", "fair", "poor", "none"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A number of the head."""

    name: str
    value: str
    grade: Grade
    about: str
    """What it is."""
    good: str
    """What is good."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Up to where a number is good, and from where it is poor; `rising` if larger is better."""

    good: float
    poor: float
    rising: bool = False

    def grade(self, value: float) -> Grade:
        sign = -1 if self.rising else 1
        if sign * value <= sign * self.good:
            return "good"
        return "fair" if sign * value <= sign * self.poor else "poor"


FVU, DEAD, DENSE = (
    Limits(good=0.15, poor=0.35),
    Limits(good=0.05, poor=0.2),
    Limits(good=0.01, poor=0.05),
)
RECOVERED = Limits(good=0.95, poor=0.8, rising=True)


class Effect(TypedDict):
    """What the head shows of an evaluation's effect on the model."""

    windows: int
    recovered_zero: float | None
    recovered_mean: float | None
    ce: NotRequired[float]
    ce_clean: NotRequired[float]
    cosine: NotRequired[float]


class Measured(TypedDict):
    """What is read of eval.json."""

    sae: NotRequired[str]
    downstream: Effect | None
    not_run: NotRequired[str | None]


def verdicts(sae: SAE, found: Reconstruction, run: Path | None) -> list[Verdict]:
    """The head of the report on an SAE, of these metrics, and of eval.json if it is in `run`."""
    tokens = f"{found.tokens:,} tokens"
    what = "the target activations'" if sae.d_out is not None else "the activations'"
    return [
        Verdict(
            name="FVU",
            value=f"{found.fvu:.4f}",
            grade=FVU.grade(found.fvu),
            about=f"Fraction of {what} variance that the reconstruction misses.",
            good=f"Good up to {FVU.good:g}, poor above {FVU.poor:g}. It falls with more active "
            "latents, so compare SAEs at equal L0.",
        ),
        l0_verdict(sae, found.l0),
        Verdict(
            name="dead",
            value=f"{found.dead_fraction:.2%}",
            grade=DEAD.grade(found.dead_fraction),
            about=f"Latents that are active for none of these {tokens}.",
            good=f"Good up to {DEAD.good:.0%}, poor above {DEAD.poor:.0%}. On few tokens, rare "
            "latents count as dead.",
        ),
        Verdict(
            name="dense",
            value=f"{found.dense_fraction:.2%}",
            grade=DENSE.grade(found.dense_fraction),
            about="Latents that are active for more than 10% of the tokens.",
            good=f"Good up to {DENSE.good:.0%}, poor above {DENSE.poor:.0%}. Dense latents rarely "
            "have one meaning.",
        ),
        recovered_verdict(sae, run),
    ]


def l0_verdict(sae: SAE, l0: float) -> Verdict:
    """Sparsity is judged by the width of the activations, which that many directions span."""
    width = sae.d_in // sae.layers
    limits = Limits(good=width / 8, poor=width / 2)
    return Verdict(
        name="L0",
        value=f"{l0:.1f}",
        grade="poor" if l0 < 1 else limits.grade(l0),
        about=f"Active latents per token, of {sae.d_sae:,}.",
        good=f"Good from 1 to {limits.good:.0f}, an eighth of the activations' width; poor above "
        f"{limits.poor:.0f}, half of it, where codes are hardly sparse.",
    )


def recovered_verdict(sae: SAE, run: Path | None) -> Verdict:
    """The effect on the model, if it has been measured for this SAE."""
    effect, why = measured(sae, run)
    recovered = effect and effect["recovered_zero"]
    causal = effect is None or "ce" in effect
    name = "CE recovered" if causal else "embeddings recovered"
    good = f"Good from {RECOVERED.good:.0%}, poor below {RECOVERED.poor:.0%}."
    if effect is None or recovered is None:
        about = why or "Zero ablation does the model no damage."
        return Verdict(name=name, value="not measured", grade="none", about=about, good=good)
    about = f"Of the damage of zero ablation, in {effect['windows']:,} windows of text"
    if (mean := effect["recovered_mean"]) is not None:
        about += f" ({mean:.1%} of that of mean ablation)"
    if "ce" in effect and "ce_clean" in effect:
        about += f". Cross-entropy {effect['ce_clean']:.3f} becomes {effect['ce']:.3f}."
    elif "cosine" in effect:
        about += f". The model is an encoder: cosine of its embeddings {effect['cosine']:.4f}."
    return Verdict(
        name=name,
        value=f"{recovered:.1%}",
        grade=RECOVERED.grade(recovered),
        about=about,
        good=good,
    )


def measured(sae: SAE, run: Path | None) -> tuple[Effect | None, str]:
    """The effect that `fastsae eval` measured of this SAE, or why it is unknown."""
    path = run and run / "eval.json"
    if path is None or not path.exists():
        return None, f"Run fastsae eval {run or 'RUN'}, then fastsae report again"
    try:
        found = read_results(Measured, path)
    except ValueError as error:
        return None, str(error)
    if found.get("sae") != weights_digest(sae):
        return (
            None,
            f"eval.json is of another SAE. Run fastsae eval {run}, then fastsae report again",
        )
    reason: Any = found.get("not_run")
    return found["downstream"], f"The model was not run: {shown(reason)}"
