"""fastsae report: one HTML file on a trained SAE, or on a sweep."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fastsae.interop import load
from fastsae.report import ReportConfig, write_comparison, write_report
from fastsae.train.run_table import REPORT

from .eval import eval_data
from .finished import subject_of, trained_with
from .parse import Given, filled, option, read_words


@dataclass(frozen=True, kw_only=True)
class Report(ReportConfig):
    """Write an HTML report on a trained SAE: its metrics, its training, and what its latents are
    active on.

    The report is one file, which loads nothing from the network. `fastsae train` writes it, too. Of
    a sweep, the page compares the SAEs.
    """

    run: Path
    """Directory of a run, of a sweep or of a saved SAE, or a file of one, from fastsae or another
    library."""


def main(words: Sequence[str]) -> str:
    given = read_words(words)
    command = filled(Report, given, ["run"])
    run = command.run
    if command.out is None and not run.is_dir():
        raise ValueError(f"{run} is not a directory, where the report could go: say where by --out")
    out = command.out or run / REPORT
    if out.is_dir():
        raise ValueError(f"{out} is a directory: --out must be the file to write")
    if (run / "sweep.json").exists():
        compare(run, out, given)
    else:
        report(command, out, given)
    written = f"written to {out} ({out.stat().st_size / 1e6:.1f} MB): open it in a browser"
    if command.neuronpedia is not None:
        written += f"\nwritten to {command.neuronpedia}: dashboards for Neuronpedia"
    return written


def compare(run: Path, out: Path, given: Given) -> None:
    """The page on a sweep, which takes no settings."""
    for name in dict(given).keys() - {"", "run", "out"}:
        raise ValueError(f"{option(name)} has no effect on the page of a sweep, which {run} is")
    write_comparison(run, out)


def report(command: Report, out: Path, given: Given) -> None:
    run, second = command.run, command.compare
    if second is not None and not (second / "metrics.jsonl").exists():
        raise ValueError(f"{second} is not a run to compare with: it has no metrics.jsonl")
    if "max_norm_ratio" not in dict(given) and (config := trained_with(run)):
        command = replace(command, max_norm_ratio=config.max_norm_ratio)
    sae = load(run)
    data = eval_data(run, command.data)
    write_report(sae, data, command, out, subject_of(run, data))
