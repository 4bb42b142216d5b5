"""The command line: fastsae train | harvest | eval."""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import tyro

from fastsae.config import to_dict
from fastsae.data import ActivationShards, HarvestConfig, demo_shards, harvest
from fastsae.device import choose_device
from fastsae.evals import EvalConfig, evaluate, evaluation_table
from fastsae.files import read_json, write_json
from fastsae.nn import load
from fastsae.train import Interrupted, TrainConfig, Trainer, resumed_config, stored_config

T = TypeVar("T")


class Unchecked:
    """Leaves the checks of a config to `plain`, out of the parser's reach: it frames errors."""

    def __post_init__(self) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class Train(Unchecked, TrainConfig):
    """Train a sparse autoencoder.

    Without --data, activations of a small transformer (MiniLM) over the sources of Python's
    standard library are harvested once, cached, and trained on: a complete run in a few minutes
    on two CPU cores.
    """

    resume: bool = False
    """Go on with the run in --out, from its last checkpoint, with its settings."""


@dataclass(frozen=True, kw_only=True)
class Harvest(Unchecked, HarvestConfig):
    """Run a Hugging Face model over text and keep the activations of one of its modules."""


@dataclass(frozen=True, kw_only=True)
class Eval(Unchecked, EvalConfig):
    """Measure a trained SAE on held-out activations, and in place in its model."""

    run: tyro.conf.Positional[Path]
    """A run's folder, or the folder of a saved SAE."""


def main() -> None:
    """Run a command; an error that its user can mend is one line, with exit code 2."""
    try:
        run(sys.argv[1:])
    except Interrupted as stop:
        print(f"fastsae: {stop}", file=sys.stderr)
        sys.exit(128 + stop.signum)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"fastsae: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def run(arguments: Sequence[str]) -> None:
    name, rest = (arguments[0], arguments[1:]) if arguments else (None, [])
    if name in ("-h", "--help"):
        print(usage())
    elif name not in COMMANDS:
        given = "nothing" if name is None else repr(name)
        raise ValueError(f"the command must be one of {', '.join(COMMANDS)}, got {given}")
    else:
        command, act = COMMANDS[name]
        parsed = tyro.cli(command, prog=f"fastsae {name}", args=rest)
        if isinstance(parsed, Train) and parsed.resume:  # what is not given is as it was
            stored = Train(resume=True, **vars(stored_config(parsed.out)))
            parsed = tyro.cli(Train, prog=f"fastsae {name}", args=rest, default=stored)
            resumed_config(plain(TrainConfig, parsed))
        act(parsed)


def usage() -> str:
    lines = [
        "usage: fastsae COMMAND [--help] [options]",
        "",
        "Train sparse autoencoders, fast.",
        "",
    ]
    for name, (command, _) in COMMANDS.items():
        lines.append(f"  {name:<9}{(command.__doc__ or '').splitlines()[0]}")
    return "\n".join(lines)


def train(command: Train) -> None:
    config = plain(TrainConfig, command)
    device = choose_device(config.device)  # before minutes are spent on the demo's data
    source = demo_shards(device=device) if config.data is None else ActivationShards(config.data)
    Trainer(config, source).fit(command.resume)
    print(run_table(config.out))


def harvest_activations(command: Harvest) -> None:
    shards = harvest(plain(HarvestConfig, command))
    print(f"{shards.n_tokens:,} tokens of width {shards.d_in} in {shards.path}")
    if shards.heldout is not None:
        print(f"{shards.heldout.n_tokens:,} tokens held out in {shards.heldout.path}")
    print(f"next: fastsae train --data {shards.path}")


def evaluate_run(command: Eval) -> None:
    folder = command.run / "sae" if (command.run / "sae").is_dir() else command.run
    sae = load(folder)
    config = plain(EvalConfig, command)
    result = evaluate(sae, eval_data(command.run, config.data), config)
    write_json(command.run / "eval.json", to_dict(result))
    print(f"{folder} on {result.data}:")
    print(evaluation_table(result))
    print(f"written to {command.run / 'eval.json'}")


COMMANDS = {
    "train": (Train, train),
    "harvest": (Harvest, harvest_activations),
    "eval": (Eval, evaluate_run),
}


def plain(cls: type[T], command: object) -> T:
    """The part of a command that is a config of the library."""
    fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
    return cls(**{field.name: getattr(command, field.name) for field in fields})


def eval_data(run: Path, data: Path | None) -> ActivationShards:
    """The data asked for, or what the run was trained on; the held-out part of either."""
    if data is None:
        settings = read_json(run / "config.json").get("config")
        if settings is None:
            raise ValueError(f"{run} is not a run's folder: say which --data to evaluate on")
        data = None if settings["data"] is None else Path(settings["data"])
    shards = demo_shards() if data is None else ActivationShards(data)
    return shards.heldout or shards


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
        "numbers": f"{out / 'summary.json'}, {out / 'metrics.jsonl'}",
        "curves": str(curves) if curves.exists() else "none: pip install 'fastsae[report]'",
        "next": f"fastsae eval {out}",
    }
    return "\n".join(f"  {name:<8} {text}" for name, text in rows.items())
