"""fastsae sweep: several SAEs, each given by a few words, trained together."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from fastsae.files import read_json
from fastsae.train import Sweep, TrainConfig
from fastsae.train.comparison import comparison_table
from fastsae.train.sweep import stored_sweep

from .parse import checked, parse, training_default, unchecked, with_activation
from .train import Train, source_of

NOT_OWN = ("activation", "recipe", "resume", "out", "seed", "data_seed")


@dataclass(frozen=True, kw_only=True)
class SweepCommand:
    """Train several SAEs on one pass over the same activations, and compare them.

    An SAE is given as an activation with settings of its own, by the names of the options below:
    fastsae sweep topk:k=16 topk:k=32,lr=0.001 jumprelu:target_l0=32 --seeds 0 1 --steps 1000
    """

    saes: tyro.conf.Positional[tuple[str, ...]] = ()
    """The SAEs: ACTIVATION or ACTIVATION:setting=value,setting=value. A switch is set by =true."""

    seeds: tuple[int, ...] = ()
    """Each SAE is trained from each of these, by default from --seed alone; the data come in the
    order of the first for all."""

    resume: bool = False
    """Go on with the sweep in --out, from the last checkpoint that all its SAEs have."""

    config: TrainConfig = field(
        default_factory=lambda: unchecked(TrainConfig(out=Path("runs/sweep")))
    )
    """What all SAEs have in common, unless they say otherwise."""


def read_sweep(words: Sequence[str]) -> SweepCommand:
    start = dataclasses.replace(training_default(words), out=Path("runs/sweep"))
    command = parse(SweepCommand, "sweep", words, SweepCommand(config=unchecked(start)))
    out = str(command.config.out)
    if command.resume and set(words) - {"--resume", "--out", out, f"--out={out}"}:
        raise ValueError(f"--resume takes the SAEs and settings of {out}: give nothing but --out")
    return command


def sweep(command: SweepCommand) -> None:
    out = command.config.out
    configs = stored_sweep(out) if command.resume else swept(command)
    Sweep(configs, source_of(next(iter(configs.values()))), out).fit(command.resume)
    print(comparison_table(read_json(out / "comparison.json")))
    print(
        f"written to {out / 'comparison.json'}; each SAE has a folder there: fastsae eval {out}/..."
    )


def swept(command: SweepCommand) -> dict[str, TrainConfig]:
    """The config of each SAE and seed, by the name of its folder."""
    if not command.saes:
        raise ValueError("name the SAEs to train, such as: fastsae sweep topk:k=16 topk:k=32")
    shared, configs = checked(command.config), {}
    for text in command.saes:
        for seed in command.seeds or (shared.seed,):
            name = re.sub(r"[^A-Za-z0-9._=-]+", "-", text).strip("-.")
            name += f"-seed{seed}" if len(command.seeds) > 1 else ""
            if name in configs:
                raise ValueError(f"{text} with seed {seed} is given twice")
            configs[name] = described(text, dataclasses.replace(shared, seed=seed))
    for setting in given_to_all(shared):
        if not any(hasattr(config.activation, setting) for config in configs.values()):
            raise ValueError(f"none of {', '.join(command.saes)} has the setting {setting}")
    return configs


def described(text: str, shared: TrainConfig) -> TrainConfig:
    """The config that words such as topk:k=16,lr=0.001 make of a shared one."""
    activation, _, settings = text.partition(":")
    words = []
    for setting in filter(None, settings.split(",")):
        name, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"{text}: {setting!r} must be setting=value")
        if name.replace("-", "_") in NOT_OWN:
            raise ValueError(f"{text}: an SAE of a sweep has no {name} of its own")
        words += [f"--{name.replace('_', '-')}", *([] if value == "true" else [value])]
    start = with_activation(shared, activation)
    theirs = {n: v for n, v in given_to_all(shared).items() if hasattr(start.activation, n)}
    start = dataclasses.replace(start, activation=dataclasses.replace(start.activation, **theirs))
    return checked(parse(Train, f"sweep {text}", words, Train(config=unchecked(start))).config)


def given_to_all(shared: TrainConfig) -> dict[str, Any]:
    """The settings of an activation that were given for every SAE that has them."""
    own = shared.activation
    usual = type(own)()
    return {name: v for name, v in vars(own).items() if v != getattr(usual, name)}
