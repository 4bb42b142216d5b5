"""Where the activations of a run come from: a model, a place in it, and how its text was cut."""

from pathlib import Path
from typing import Any

from fastsae.data import ActivationSource, Joined, Stream

from .columns import Columns
from .summary import Origin, Summary, read_results

Site = tuple[str | None, dict[str, Any]]
"""A hookpoint, if it is known, and the settings of its harvest."""


def origin_of(columns: Columns) -> Origin:
    """The origin of a run's data; empty if nothing is known of it."""
    source = columns.source
    parts = source.sources if isinstance(source, Joined) else (source,)
    model, sites = getattr(parts[0], "model", None), [s for part in parts for s in sites_of(part)]
    if model is None:
        return {}
    harvest, places = sites[0][1], hooks_of(sites, columns.transcoder)
    known = places.get("hook_name") != places.get("hf_hook_name")
    found = {
        "model_name": model,
        "model_class_name": "HookedTransformer" if known else "AutoModelForCausalLM",
        **places,
        "prepend_bos": harvest.get("begins_with_bos"),
        "context_size": harvest.get("context_length"),
        "seqpos_slice": (1, None) if harvest.get("drop_first") else None,
        "dataset_path": harvest.get("dataset"),
    }
    return Origin(**{name: value for name, value in found.items() if value is not None})


def hooks_of(sites: list[Site], transcoder: bool) -> dict[str, Any]:
    """The entries of an origin that name its hookpoints: one, a transcoder's two, or those of a
    crosscoder."""
    paths = [path for path, _ in sites]
    if len(sites) > 1 and not transcoder:
        return {"hf_hook_names": None if None in paths else tuple(paths)}
    found = {}
    for end, (path, harvest) in zip(("", "_out"), sites, strict=False):
        found |= {f"hook_name{end}": lens_name(path, harvest), f"hf_hook_name{end}": path}
    return found


def sites_of(source: ActivationSource) -> list[Site]:
    """The hookpoints whose rows a source has, side by side."""
    harvest = getattr(source, "harvest", None) or {}
    paths = (
        source.hookpoints if isinstance(source, Stream) else [getattr(source, "hookpoint", None)]
    )
    return [(path, harvest) for path in paths]


def lens_name(path: str | None, harvest: dict[str, Any]) -> str | None:
    """The TransformerLens name of a hookpoint, else its path."""
    names = harvest.get("lens_names")
    return names.get(path, path) if isinstance(names, dict) else path


def stored_origin(run: Path) -> Origin:
    """The origin of the data of the run in a folder; empty where there is none, or it is of an
    older version."""
    path = run / "summary.json"
    return read_results(Summary, path).get("origin", {}) if path.exists() else {}


def stored_local(run: Path, origin: Origin) -> tuple[str, ...]:
    """Which values of its stored origin were paths when the run in a folder was made; of an older
    version, which are paths now."""
    path = run / "summary.json"
    found = read_results(Summary, path).get("local") if path.exists() else None
    return local_in(origin) if found is None else found


def local_in(origin: Origin) -> tuple[str, ...]:
    """Which values of an origin are paths of this machine: what loads them prefers those to ids."""
    values = ((name, origin.get(name)) for name in ("model_name", "dataset_path"))
    return tuple(name for name, value in values if value is not None and Path(value).exists())
