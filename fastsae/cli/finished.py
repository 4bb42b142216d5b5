"""What a command leaves of finished runs: their report, and the table that it prints."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastsae.data import ActivationArray, Joined, StoredActivations, stored
from fastsae.files import read_json
from fastsae.nn import SAE
from fastsae.progress import say
from fastsae.report import ReportConfig, Subject, write_comparison, write_report
from fastsae.train import Callback, Sweep, TrainConfig, Trainer, stored_config
from fastsae.train.comparison import comparison_table
from fastsae.train.run_table import REPORT
from fastsae.train.summary import Summary, read_results


def trained_with(folder: Path) -> TrainConfig | None:
    """The config of the run in a folder; None where there is another's SAE."""
    path = folder / "config.json"
    found = read_json(path) if path.exists() else None
    return stored_config(folder) if isinstance(found, dict) and found.get("config") else None


def trained_on(run: Path, data: StoredActivations) -> bool:
    """Whether the run was trained on just these rows."""
    config = trained_with(run)
    if config is not None and config.stream is not None:
        return isinstance(data, ActivationArray) and not data.has_contexts  # not what is held out
    first = data.sources[0] if isinstance(data, Joined) else data
    path = getattr(first, "path", None)
    if config is None or config.data is None or path is None:
        return False
    return path.resolve() == config.data.resolve()


def subject_of(run: Path, data: StoredActivations) -> Subject:
    """What a report says of the SAE in a directory or file, and of the data it is shown on."""
    return Subject(
        title=run.resolve().name,
        run=run if run.is_dir() else None,
        trained=trained_with(run),
        on_training_data=trained_on(run, data),
    )


@contextmanager
def without_fail(later: str) -> Iterator[None]:
    """Whatever fails in a report is a warning that says how to write it later: runs are complete
    without it."""
    try:
        yield
    except Exception as error:  # of any kind: the run is complete without its report
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        say(f"no report ({reason}); to write it, run: {later}", logging.WARNING)


class ReportAtEnd(Callback):
    """Writes the report on a run when it ends, before trackers store it; not where many processes
    divide the SAE. It loads no model, because the optimizer is still in memory."""

    def on_end(self, trainer: Trainer, sae: SAE) -> None:
        config, source = trainer.config, trainer.source
        if trainer.shards.size > 1:
            return
        with without_fail(f"fastsae report {config.out}"):
            data = source.heldout or stored(source)
            settings = ReportConfig(
                lens=False, device=config.device, max_norm_ratio=config.max_norm_ratio
            )
            write_report(sae, data, settings, config.out / REPORT, subject_of(config.out, data))


def sweep_table(sweep: Sweep, resume: bool, report: bool = True) -> str:
    """Train several SAEs and write the page that compares them; the comparison."""
    out = sweep.out
    sweep.fit(resume)
    written = [str(out / "comparison.json")]
    if report and not sweep.shards.rank:
        with without_fail(f"fastsae report {out}"):
            write_comparison(out, out / REPORT)
            written.append(str(out / REPORT))
    table = comparison_table(read_results(dict[str, Summary], out / "comparison.json"))
    files = " and ".join(written)
    return f"{table}\nwritten to {files}; evaluate an SAE with: fastsae eval {out}/..."
