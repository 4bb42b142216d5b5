"""fastsae train: one SAE."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastsae.data import ActivationShards, Joined, demo_shards
from fastsae.device import choose_device
from fastsae.files import read_json
from fastsae.train import TrainConfig, Trainer, resumed_config, stored_config

from .parse import (
    Activation,
    Recipe,
    checked,
    named,
    parse,
    training_default,
    unchecked,
    with_activation,
)


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a sparse autoencoder.

    Without --data, activations of a small transformer (MiniLM) over the sources of Python's
    standard library are harvested once, cached, and trained on: a complete run in a few minutes
    on two CPU cores. With --activation NAME, --help lists the settings of that activation.
    """

    activation: Activation = "topk"
    """Which activation; its settings are listed below."""

    recipe: Recipe | None = None
    """Start from the settings of another trainer; options given beside it replace them."""

    resume: bool = False
    """Go on with the run in --out, from its last checkpoint, with its settings."""

    config: TrainConfig = field(default_factory=lambda: unchecked(TrainConfig()))
    """The run."""


def read_train(words: Sequence[str]) -> Train:
    """The command, its run as it was stored where that is to be resumed."""
    default = Train(config=unchecked(training_default(words)))
    command = parse(Train, "train", words, default)
    if command.resume:
        stored = stored_config(command.config.out)
        given = named(words, activation=str, recipe=str)
        if given.recipe is not None:
            raise ValueError(f"--resume takes the settings of {command.config.out}: no --recipe")
        start = stored if given.activation is None else with_activation(stored, given.activation)
        command = parse(Train, "train", words, Train(config=unchecked(start)))
        resumed_config(checked(command.config))
    return command


def train(command: Train) -> None:
    config = checked(command.config)
    Trainer(config, source_of(config)).fit(command.resume)
    print(run_table(config.out))


def source_of(config: TrainConfig) -> ActivationShards | Joined:
    """What a run reads: its data, side by side with its targets or further layers."""
    device = choose_device(config.device)  # before minutes are spent on the demo's data
    first = demo_shards(device=device) if config.data is None else ActivationShards(config.data)
    target = () if config.target is None else (config.target,)
    further = [ActivationShards(path) for path in (*target, *config.layers)]
    return Joined(first, *further) if further else first


def run_table(out: Path) -> str:
    """A finished run in a few lines: its numbers, and where its files are."""
    found = read_json(out / "summary.json")
    curves = out / "curves.png"
    rows = {
        "FVU": f"{found['fvu']:.4f}  (variance unexplained, on {found['evaluated_on']})",
        "L0": f"{found['l0']:.1f}  (active latents per token)",
        "dead": f"{found['dead_fraction']:.2%}  (of the latents, silent on these "
        f"{found['evaluated_tokens']:,} tokens)",
        "tokens": f"{found['tokens']:,}, {found['tokens_per_second']:,.0f} per second",
        "time": f"{found['seconds']:.0f} s  ({found['step_path']} step)",
        "SAE": f"{out / 'sae'}  (fastsae.load({str(out / 'sae')!r}))",
        "SAELens": found["sae_lens"],
        "numbers": f"{out / 'summary.json'}, {out / 'metrics.jsonl'}",
        "curves": str(curves) if curves.exists() else "none: pip install 'fastsae[report]'",
        "next": f"fastsae eval {out}",
    }
    return "\n".join(f"  {name:<8} {text}" for name, text in rows.items())
