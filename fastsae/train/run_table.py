"""The results of a finished run in a few lines."""

from pathlib import Path

from fastsae.estimate import gigabytes, milliseconds
from fastsae.evals.verdict import remarks, verdict

from .facts import Facts
from .summary import Summary, read_results

REPORT = "report.html"
"""The report on a run, in its directory."""


def run_table(out: Path) -> str:
    """A finished run in a few lines: its metrics and where its files are."""
    found = read_results(Summary, out / "summary.json")
    curves, report = out / "curves.png", out / REPORT
    activation = found.get("activation", "")
    about = {
        "fvu": ("FVU", ".4f", f"fraction of variance unexplained, on {found['evaluated_on']}"),
        "l0": ("L0", ".1f", "active latents per token"),
        "dead_fraction": (
            "dead",
            ".2%",
            f"latents never active on these {found['evaluated_tokens']:,} tokens",
        ),
    }
    judged = {
        title: f"{found[name]:{form}}  ({meaning}): {verdict(name, found[name], activation)[0]}"
        for name, (title, form, meaning) in about.items()
    }
    facts = found.get("facts", {})
    rows = {
        **judged,
        "tokens": f"{found['tokens']:,}, {found['tokens_per_second']:,.0f} per second",
        "time": f"{found['seconds']:.0f} s  ({found['step_path']} step)",
        **({"planned": planned} if (planned := plan_against_fact(facts)) else {}),
        **({"ended": f"early: {found['ended_early']}"} if "ended_early" in found else {}),
        "SAE": f"{out / 'sae'}  (fastsae.load({str(out / 'sae')!r}))",
        "SAELens": found["sae_lens"],
        "metrics": f"{out / 'summary.json'}, {out / 'metrics.jsonl'}",
        "curves": str(curves) if curves.exists() else "none: pip install 'fastsae-triton[report]'",
        "report": str(report) if report.exists() else f"none yet: fastsae report {out}",
        "next": f"fastsae eval {out}",
    }
    notes = [("note", text) for text in remarks(found, activation)]
    return "\n".join(f"  {name:<8} {text}" for name, text in [*rows.items(), *notes])


def plan_against_fact(facts: Facts) -> str:
    """What was planned next to what it took, as far as both are known."""
    parts = []
    if "planned_step_seconds" in facts and "step_seconds" in facts:
        planned, taken = (facts[key] for key in ("planned_step_seconds", "step_seconds"))
        parts.append(f"{milliseconds(planned)} per step, took {milliseconds(taken)}")
    if "planned_peak_bytes" in facts and "peak_bytes" in facts:
        planned, taken = gigabytes(facts["planned_peak_bytes"]), gigabytes(facts["peak_bytes"])
        parts.append(f"{planned} of memory, took {taken}")
    return "; ".join(parts)
