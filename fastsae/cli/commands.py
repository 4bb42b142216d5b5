"""What each command is told, and what it does."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from fastsae.config import to_dict
from fastsae.data import ActivationShards, HarvestConfig, Joined, harvest_each
from fastsae.evals import EvalConfig, evaluate, evaluation_table
from fastsae.files import read_json, write_json
from fastsae.interop import load
from fastsae.train import stored_config

from .convert import Convert, convert
from .parse import Unchecked, checked, parse
from .sweep import SweepCommand, read_sweep, sweep
from .train import Train, read_train, source_of, train
from .upgrade import Upgrade, read_upgrade, upgrade_sae


@dataclass(frozen=True, kw_only=True)
class Harvest(Unchecked, HarvestConfig):
    """Run a Hugging Face model over text and keep the activations of some of its modules."""

    checked = HarvestConfig


@dataclass(frozen=True, kw_only=True)
class Eval(Unchecked, EvalConfig):
    """Measure a trained SAE on held-out activations, and in place in its model."""

    checked = EvalConfig

    run: tyro.conf.Positional[Path]
    """A run's folder, or that of a saved SAE, of fastsae or another library."""


def harvest_activations(command: Harvest) -> None:
    found = list(harvest_each(checked(command)).values())
    for shards in found:
        print(f"{shards.n_tokens:,} tokens of width {shards.d_in} in {shards.path}")
        if shards.heldout is not None:
            print(f"{shards.heldout.n_tokens:,} tokens held out in {shards.heldout.path}")
    print(f"next: fastsae train --data {found[0].path}")
    if len(found) > 1:
        print(f"or a transcoder: --target {found[1].path}; a crosscoder: --layers {found[1].path}")


def evaluate_run(command: Eval) -> None:
    if not command.run.is_dir():
        raise ValueError(f"{command.run} is not a folder, where the results could go")
    sae = load(command.run)
    config = checked(command)
    result = evaluate(sae, eval_data(command.run, config.data), config)
    write_json(command.run / "eval.json", to_dict(result))
    print(f"{command.run} on {result.data}:")
    print(evaluation_table(result))
    print(f"written to {command.run / 'eval.json'}")


def eval_data(run: Path, data: Path | None) -> ActivationShards | Joined:
    """The data asked for, or what the run was trained on; the held-out part of either."""
    if data is not None:
        source = ActivationShards(data)
    elif read_json(run / "config.json").get("config") is None:
        raise ValueError(f"{run} is not a run's folder: say which --data to evaluate on")
    else:
        source = source_of(stored_config(run))
    return source.heldout or source


class Command(NamedTuple):
    """A command's options, how words become them, and what is done."""

    options: type
    read: Callable[[Sequence[str]], Any]
    act: Callable[[Any], None]


COMMANDS = {
    "train": Command(Train, read_train, train),
    "sweep": Command(SweepCommand, read_sweep, sweep),
    "harvest": Command(
        Harvest, lambda words: parse(Harvest, "harvest", words), harvest_activations
    ),
    "upgrade": Command(Upgrade, read_upgrade, upgrade_sae),
    "eval": Command(Eval, lambda words: parse(Eval, "eval", words), evaluate_run),
    "convert": Command(Convert, lambda words: parse(Convert, "convert", words), convert),
}
