"""The files of a repository: fastsae's own, the layouts of other libraries, curves and card."""

import shutil
from pathlib import Path

import fastsae.interop as interop
from fastsae.evals import evaluation_rows, read_evaluation
from fastsae.files import write_atomically
from fastsae.nn import SAE
from fastsae.train.origin import stored_local, stored_origin
from fastsae.train.summary import Origin, Summary, read_results

from .card import Results, model_card
from .config import HUB_ID, PushConfig

LAYOUTS = "sae_lens", "sparsify"
"""Formats in directories of their names. Those of others are pickles, which are not uploaded."""

SUMMARY = {
    "fvu": ("FVU", ".4f", "fraction of variance unexplained"),
    "l0": ("L0", ".1f", "active latents per token"),
    "dead_fraction": ("dead", ".2%", "of latents: never active"),
}


def write_repository(
    sae: SAE, folder: Path, config: PushConfig, run: Path | None = None
) -> dict[str, str]:
    """Write all that is pushed to a folder.

    Args:
        folder: new or empty.
        run: directory of the run that trained the SAE, with its numbers and curves.

    Returns:
        Why a layout was left out, by its name.

    ValueError for a folder that holds something, which would be pushed too.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not an empty directory: choose another one")
    sae.save(folder)
    origin = published(run, config) if run else Origin()
    missing: dict[str, str] = {}
    for name in () if config.native_only else LAYOUTS:
        try:
            interop.save(sae, folder / name, name, **origin)
        except ValueError as error:
            missing[name] = str(error)
    curves = run and run / "curves.png"
    if curves and curves.exists():
        write_atomically(folder / "curves.png", lambda path: shutil.copyfile(curves, path))
    text = model_card(
        sae,
        config,
        origin,
        results_of(run) if run else None,
        layouts=tuple(name for name in LAYOUTS if (folder / name).is_dir()),
        curves=(folder / "curves.png").exists(),
    )
    write_atomically(folder / "README.md", lambda path: path.write_text(text, encoding="utf-8"))
    return missing


def published(run: Path, config: PushConfig) -> Origin:
    """A run's origin without paths of the machine, of which the last part is kept, and with the
    base model's id, if it is given."""
    found = stored_origin(run)
    local = stored_local(run, found)
    for name in ("model_name", "dataset_path"):
        value = found.get(name)
        if value is not None and (name in local or not HUB_ID.fullmatch(value)):
            found[name] = Path(value).name
    if config.base_model is not None:
        found["model_name"] = config.base_model
    return found


def results_of(run: Path) -> Results | None:
    """The numbers of `fastsae eval` if it was run, else those at the end of training; None if the
    folder has neither."""
    summary = run / "summary.json"
    found = read_results(Summary, summary) if summary.exists() else None
    about = found and f"{found['tokens']:,} tokens in {found['seconds']:,.0f} s"
    if (run / "eval.json").exists():
        evaluation = read_evaluation(run / "eval.json")
        tokens = evaluation.reconstruction.tokens
        return Results(evaluation_rows(evaluation), f"{tokens:,} tokens", about)
    if found is None:
        return None
    rows = [(name, format(found[key], spec), text) for key, (name, spec, text) in SUMMARY.items()]
    where = f"{found['evaluated_tokens']:,} tokens of {found['evaluated_on']}"
    return Results(rows, where, about)
