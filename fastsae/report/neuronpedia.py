"""Dashboards of latents in the JSON that SAEDashboard writes and Neuronpedia imports."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from fastsae.data import StoredActivations
from fastsae.files import write_json
from fastsae.nn import SAE
from fastsae.train.describe import describe_activation
from fastsae.train.run_folder import weights_digest
from fastsae.version import __version__

from .bars import NO_BARS, Bars, bars
from .config import ReportConfig
from .contexts import Shown, number
from .correlations import Correlated, LatentSums, correlated_inputs, correlated_latents
from .evidence import Evidence
from .lens import Directions
from .subject import Subject, hookpoints, published, sources_of
from .text import Strings, has_text, plain

Json = dict[str, Any]

BATCH = 128
"""Latents of a file, as in SAEDashboard's."""

ALIGNED = 3
"""Coordinates of a decoder row that are listed."""

TOP = {"bin_min": -1, "bin_contains": -1}
"""Marks the strongest contexts, which are of no interval."""


def check_exportable(sae: SAE, data: StoredActivations, folder: Path) -> None:
    """ValueError unless dashboards of this SAE on this data can be written to the folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"neuronpedia must be a new or empty directory, got {folder}")
    if sae.layers > 1:
        raise ValueError("neuronpedia supports SAEs and transcoders, not crosscoders")
    if not has_text(data):
        raise ValueError(
            "neuronpedia needs activations whose text is known: use data of fastsae harvest"
        )


def write_dashboards(
    sae: SAE,
    data: StoredActivations,
    config: ReportConfig,
    evidence: Evidence,
    subject: Subject,
) -> None:
    """Write batch-0.json and so on to `config.neuronpedia`, and provenance.json on all of them."""
    folder = config.neuronpedia
    assert folder is not None
    active = torch.from_numpy(evidence.firings.counts)[evidence.latents] > 0
    shown = evidence.only(active)
    latents, layer = shown.latents, layer_number(hookpoints(data))
    notes = [*evidence.notes]
    if layer is None:
        notes.append(f"layer is 0: {hookpoints(data) or 'the hookpoint'} names no block.")
    head = {
        "model_id": model_id(data).rpartition("/")[2].lower(),
        "layer": layer or 0,
        "sae_set": re.sub(r"[^a-z0-9]+", "-", subject.title.lower()).strip("-"),
        "sae_id_suffix": None,
    }
    about = {
        "fastsae": __version__,
        "sae": subject.title,
        "activation": describe_activation(sae.activation.cfg),
        "weights (BLAKE2b)": weights_digest(sae),
        "model": model_id(data),
        "hookpoint": hookpoints(data),
        "dataset": dataset(data),
        "tokens": evidence.firings.found.tokens,
        "d_sae": sae.d_sae,
        "latents": len(latents),
        "latents left out because they are never active": int((~active).sum()),
        "seed": config.seed,
        "notes": notes,
    }
    features = dashboards(sae, data, shown, config.seed, config.batch_size)
    with new_folder(folder) as made:
        for batch, some in enumerate(latents.split(BATCH)):
            found = head | {"features": [next(features) for _ in some]}
            write_json(made / f"batch-{batch}.json", found, compact=True)
        write_json(made / "provenance.json", about, compact=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A directory that becomes `folder`, new or empty, if the block ends without an error."""
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name[:99]}-") as beside:
        made = Path(beside) / "made"  # TemporaryDirectory's own is for its user only
        made.mkdir()
        yield made
        if folder.exists():
            folder.rmdir()
        made.rename(folder)


def dashboards(
    sae: SAE, data: StoredActivations, evidence: Evidence, seed: int, batch_size: int
) -> Iterator[Json]:
    """The dashboards of the latents, one by one."""
    firings, windows, latents = evidence.firings, evidence.windows, evidence.latents
    assert windows is not None and firings.inputs is not None
    if not len(latents):
        return
    text = evidence.text.shown_as(plain)
    shown = Shown(firings=firings, windows=windows, text=text, strings=Strings(), seed=seed)
    sums = LatentSums.of(firings)
    prompts = {
        "n_prompts_total": len(np.unique(windows.firsts)),
        "n_tokens_in_prompt": int((windows.ends - windows.firsts).max()),
        "dataset": dataset(data),
    }
    tables = zip(
        latents.tolist(),
        aligned(sae, latents),
        correlated_inputs(
            firings,
            sums,
            firings.inputs,
            latents.tolist(),
            inputs(sae, data, firings.rows, batch_size),
        ),
        correlated_latents(firings, sums, latents.tolist()),
        evidence.lens or [Directions([], [], 1.0, 0.0, NO_BARS)] * len(latents),
        strict=True,
    )
    for latent, alignment, neurons, others, lens in tables:
        values = firings.of(latent)[1]
        yield {
            "feature_index": latent,
            **alignment,
            **correlations("neurons", neurons),
            **correlations("features", others),
            **logits(lens, shown),
            "frac_nonzero": number(len(values) / firings.found.tokens),
            **histogram("freq", bars(values)),
            **histogram("logits", lens.histogram),
            **prompts,
            "decoder_weights_dist": [],
            "activations": [*activations(shown, latent, firings.found.tokens)],
            "vector": [],
        }


def inputs(
    sae: SAE, data: StoredActivations, rows: Int64[Tensor, " tokens"], batch_size: int
) -> Iterator[Float32[Tensor, "_ d_in"]]:
    """The SAE's inputs of some rows of the data, as it saw them."""
    for some in rows.split(batch_size):
        yield data.rows(some)[:, : sae.d_in].to(sae.b_dec.dtype).float()


def aligned(sae: SAE, latents: Int64[Tensor, " n"]) -> Iterator[Json]:
    """For each latent, the largest entries of its decoder row, and what part each is of the sum of
    the row's absolute values."""
    rows = sae.W_dec.detach()[latents].float()
    values, places = rows.topk(min(ALIGNED, rows.shape[1]), dim=1)
    parts = values.abs() / rows.abs().sum(1, keepdim=True).clamp_min(torch.finfo().tiny)
    for found in zip(places.tolist(), values.tolist(), parts.tolist(), strict=True):
        indices, largest, part = found
        yield {
            "neuron_alignment_indices": indices,
            "neuron_alignment_values": [*map(number, largest)],
            "neuron_alignment_l1": [*map(number, part)],
        }


def correlations(of: str, found: Correlated) -> Json:
    """What SAEDashboard stores in `l1` is the cosine."""
    return {
        f"correlated_{of}_indices": found.indices,
        f"correlated_{of}_l1": [*map(number, found.cosine)],
        f"correlated_{of}_pearson": [*map(number, found.pearson)],
    }


def logits(lens: Directions, shown: Shown) -> Json:
    """The tokens that the latent suppresses and promotes."""
    sides = {"neg": lens.suppressed, "pos": lens.promoted}
    words = {f"{side}_str": [shown.text[i] for i, _ in found] for side, found in sides.items()}
    values = {f"{side}_values": [number(v) for _, v in found] for side, found in sides.items()}
    return words | values


def histogram(of: str, found: Bars) -> Json:
    return {
        f"{of}_hist_data_bar_values": [*map(number, found.middles)],
        f"{of}_hist_data_bar_heights": found.heights,
    }


def activations(shown: Shown, latent: int, tokens: int) -> Iterator[Json]:
    """The contexts of a latent's card: the strongest, the most negative, and those of intervals."""
    card = shown.card(latent)
    for context in card.get("top", []):
        yield activation(shown, context, TOP | {"bin_max": card["histogram"]["to"]})
    lowest = {"bin_min": card["histogram"]["from"], "bin_max": 0}
    for context in card.get("low", []):
        yield activation(shown, context, TOP | lowest)
    for band in card.get("bands", []):
        low, high = band["range"]  # of magnitudes
        below = {"bin_min": -high, "bin_max": -low, "bin_contains": band["negative"]}
        above = {"bin_min": low, "bin_max": high, "bin_contains": band["count"] - band["negative"]}
        for interval in below, above:
            interval["bin_contains"] = number(interval["bin_contains"] / tokens)
        for context in band["contexts"]:
            peak = context["active"][context["active"][::2].index(context["peak"]) * 2 + 1]
            yield activation(shown, context, below if peak < 0 else above)


def activation(shown: Shown, context: Json, interval: Json) -> Json:
    """A context, with an activation for every token."""
    values = [0.0] * len(context["text"])
    for place, value in zip(context["active"][::2], context["active"][1::2], strict=True):
        values[place] = value
    tokens = [shown.strings.texts[i] for i in context["text"]]
    return {
        **interval,
        "tokens": tokens,
        "values": values,
        "qualifying_token_index": context["peak"],
    }


def model_id(data: StoredActivations) -> str:
    """The model's hub id, or the name of its directory; empty if it is unknown."""
    return published(str(getattr(data, "model", None) or ""))


def layer_number(hookpoint: str) -> int | None:
    """The number of the block in a hookpoint's name, in the first if there are several; None if it
    has none."""
    found = re.search(r"\.(\d+)(?=[.: ]|$)", hookpoint.partition(" + ")[0])
    return int(found[1]) if found else None


def dataset(data: StoredActivations) -> str:
    """The dataset's hub id, or the names of its files or folders; empty if it is unknown."""
    harvests = (getattr(source, "harvest", None) or {} for source in sources_of(data))
    given = next(harvests)
    names = given.get("dataset") or given.get("text") or []
    return ", ".join(map(published, [names] if isinstance(names, str) else map(str, names)))
