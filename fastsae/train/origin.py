"""Where the activations of a run come from: a model, a place in it, and how its text was cut."""

from pathlib import Path
from typing import Any

from fastsae.data import ActivationSource, Joined, Stream

from .summary import Origin, Summary, read_results

Site = tuple[str | None, dict[str, Any]]
"""A hookpoint, if it is known, and the settings of its harvest."""


def origin_of(source: ActivationSource) -> Origin:
    """The origin of a run's data; empty if nothing is known of it."""
    parts = source.sources if isinstance(source, Joined) else (source,)
    model, sites = getattr(parts[0], "model", None), [s for part in parts for s in sites_of(part)]
    if model is None:
        return {}
    (path, harvest), name = sites[0], lens_name(*sites[0])
    found = {
        "model_name": model,
        "model_class_name": "AutoModelForCausalLM" if name == path else "HookedTransformer",
        "hook_name": name,
        "hf_hook_name": path,
        "prepend_bos": harvest.get("begins_with_bos"),
        "context_size": harvest.get("context_length"),
        "seqpos_slice": (1, None) if harvest.get("drop_first") else None,
        "dataset_path": harvest.get("dataset"),
    }
    if len(sites) == 2:
        found |= {"hook_name_out": lens_name(*sites[1]), "hf_hook_name_out": sites[1][0]}
    return Origin(**{name: value for name, value in found.items() if value is not None})


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
