"""The head of a report: a few numbers, whether they are good, and what is good."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastsae.evals import CausalEffect, Downstream, Reconstruction, read_evaluation
from fastsae.evals.verdict import LIMITS, SPARSEST, verdict
from fastsae.files import shown
from fastsae.nn import SAE
from fastsae.train.run_folder import weights_digest

from .subject import published_text

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


def good_and_poor(name: str, form: str) -> str:
    """The limits of a metric, in words."""
    limits = LIMITS[name]
    to, beyond = ("from", "below") if limits.above else ("up to", "above")
    if name == "l0":
        to = f"from {SPARSEST} to"
    return f"Good {to} {limits.good:{form}}, poor {beyond} {limits.fair:{form}}."


def verdicts(sae: SAE, found: Reconstruction, run: Path | None) -> list[Verdict]:
    """The head of the report on an SAE, of these metrics, and of eval.json if it is in `run`."""
    tokens = f"{found.tokens:,} tokens"
    what = "the target activations'" if sae.d_out is not None else "the activations'"

    def judged(name: str, title: str, shown_as: str, form: str, about: str, why: str) -> Verdict:
        value = getattr(found, name)
        return Verdict(
            name=title,
            value=format(value, shown_as),
            grade=verdict(name, value, sae.activation.cfg.name)[0],
            about=about,
            good=f"{good_and_poor(name, form)} {why}",
        )

    return [
        judged(
            "fvu",
            "FVU",
            ".4f",
            "g",
            f"Fraction of {what} variance that the reconstruction misses.",
            "It falls with more active latents, so compare SAEs at equal L0.",
        ),
        judged(
            "l0",
            "L0",
            ".1f",
            "g",
            f"Active latents per token, of {sae.d_sae:,}.",
            "The fewer, the easier a token's code is to read.",
        ),
        judged(
            "dead_fraction",
            "dead",
            ".2%",
            ".0%",
            f"Latents that are active for none of these {tokens}.",
            "On few tokens, rare latents count as dead.",
        ),
        judged(
            "dense_fraction",
            "dense",
            ".2%",
            ".0%",
            "Latents that are active for more than 10% of the tokens.",
            "Dense latents rarely have one meaning.",
        ),
        recovered_verdict(sae, run),
    ]


def recovered_verdict(sae: SAE, run: Path | None) -> Verdict:
    """The effect on the model, if it has been measured for this SAE."""
    effect, why = measured(sae, run)
    recovered = effect and effect.recovered_zero
    causal = effect is None or isinstance(effect, CausalEffect)
    name = "CE recovered" if causal else "embeddings recovered"
    good = good_and_poor("recovered_zero", ".1%")
    if effect is None or recovered is None:
        about = published_text(why, run) or "Zero ablation does the model no damage."
        return Verdict(name=name, value="not measured", grade="none", about=about, good=good)
    about = f"Of the damage of zero ablation, in {effect.windows:,} windows of text"
    if effect.recovered_mean is not None:
        about += f" ({effect.recovered_mean:.1%} of that of mean ablation)"
    if isinstance(effect, CausalEffect):
        about += (
            f". Loss {effect.ce_clean:.3f} → {effect.ce:.3f} ({effect.ce - effect.ce_clean:+.3f} "
            f"nats per token); zero ablation {effect.ce_zero:.3f}, mean ablation "
            f"{effect.ce_mean:.3f}."
        )
    else:
        about += f". The model is an encoder: cosine of its embeddings {effect.cosine:.4f}."
    return Verdict(
        name=name,
        value=f"{recovered:.1%}",
        grade=verdict("recovered_zero", recovered, sae.activation.cfg.name)[0],
        about=about,
        good=good,
    )


def measured(sae: SAE, run: Path | None) -> tuple[Downstream | None, str]:
    """The effect that `fastsae eval` measured of this SAE, or why it is unknown."""
    path = run and run / "eval.json"
    if path is None or not path.exists():
        return None, f"Run fastsae eval {run or 'RUN'}, then fastsae report again"
    try:
        found = read_evaluation(path)
    except ValueError as error:
        return None, str(error)
    if found.sae != weights_digest(sae):
        return (
            None,
            f"eval.json is of another SAE. Run fastsae eval {run}, then fastsae report again",
        )
    reason = "" if found.not_run is None else f"The model was not run: {shown(found.not_run)}"
    return found.downstream, reason
