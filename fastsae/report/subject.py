"""Where an SAE and the data that it is shown on are from."""

import re
from dataclasses import dataclass
from pathlib import Path

from fastsae.data import Joined, StoredActivations
from fastsae.nn import SAE
from fastsae.train import TrainConfig
from fastsae.train.describe import describe_activation
from fastsae.train.run_folder import weights_digest
from fastsae.train.summary import Summary, read_results

from .firings import Firings

ABSOLUTE = re.compile(r"""(?<![\w.:/])/(?:[^\s/'"]+/)+(?=[^\s/'"])""")
"""The directories of an absolute path in a text."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is known of an SAE besides itself."""

    title: str
    """Name of the SAE."""

    run: Path | None = None
    """Directory of the run or SAE, with metrics.jsonl, summary.json and eval.json if there are."""

    trained: TrainConfig | None = None
    """Settings of the run."""

    on_training_data: bool = False
    """Whether the data is what it was trained on."""


def describe(sae: SAE, data: StoredActivations) -> str:
    """The SAE in one line."""
    kinds = [
        "crosscoder" if sae.layers > 1 else "transcoder" if sae.d_out is not None else "SAE",
        describe_activation(sae.activation.cfg),
        f"{sae.d_sae:,} latents of width {sae.d_in}"
        + (f" to {sae.d_out}" if sae.d_out is not None else ""),
    ]
    return " · ".join([*kinds, *filter(None, [model_name(data), hookpoints(data)])])


def sources_of(data: StoredActivations) -> tuple[StoredActivations, ...]:
    return data.sources if isinstance(data, Joined) else (data,)


def hookpoints(data: StoredActivations) -> str:
    """Where in the model the data is from, as far as it is known."""
    found = (getattr(source, "hookpoint", None) for source in sources_of(data))
    return " + ".join(filter(None, found))


def model_name(data: StoredActivations) -> str:
    """The model's hub id, or the end of its path; empty if it is unknown."""
    model = getattr(data, "model", None)
    return "/".join(Path(model).parts[-2:]) if model else ""


def published(name: str) -> str:
    """A name without the directories of an absolute path, which are this machine's affair."""
    return Path(name).name if Path(name).is_absolute() else name


def published_text(text: str, *names: str | Path | None) -> str:
    """A text in which these names, and other absolute paths, have no directories."""
    for name in filter(None, map(str, names)):
        text = text.replace(name, published(name))
    return ABSOLUTE.sub("", text)


def provenance(
    sae: SAE, data: StoredActivations, firings: Firings, subject: Subject
) -> list[tuple[str, str]]:
    """Names and values of what there is to know, in the order to be shown; paths as published."""
    found, config = firings.found, subject.trained
    where = " + ".join(
        published(str(getattr(part, "path", None) or part)) for part in sources_of(data)
    )
    left = f"; {found.left_out:,} of extreme norm left out" if found.left_out else ""
    rows = {
        "SAE": published(str(subject.run or subject.title)),
        "activation": describe_activation(sae.activation.cfg),
        "model": published(str(getattr(data, "model", None) or "unknown")),
        "hookpoint": hookpoints(data) or "unknown",
        "shown on": f"{found.tokens:,} of {data.n_tokens:,} tokens of {where}{left}",
        "weights": f"{weights_digest(sae)} (BLAKE2b)",
    }
    if config is not None:
        rows["trained on"] = trained_on(config)
        rows["seed"] = str(config.seed)
        rows["batch size"] = f"{config.batch_size:,} tokens"
        rows |= training(subject.run)
    return [*rows.items()]


def trained_on(config: TrainConfig) -> str:
    if config.stream is not None:
        return f"a stream of {published(config.stream.model)} over its text"
    if config.data is None:
        return "the demo's activations: MiniLM over the Python standard library"
    return published(str(config.data))


def training(run: Path | None) -> dict[str, str]:
    """How a run's training went; nothing if it has no summary."""
    path = run and run / "summary.json"
    if path is None or not path.exists():
        return {}
    summary = read_results(Summary, path)
    speed = f"{summary['tokens_per_second']:,.0f} per second"
    return {
        "tokens": f"{summary['tokens']:,}, {speed}",
        "time": f"{summary['seconds']:,.0f} s ({summary['step_path']} step)",
    }
