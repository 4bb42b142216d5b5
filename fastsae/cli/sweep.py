"""fastsae sweep: several SAEs trained together."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastsae.data import StreamConfig
from fastsae.distributed.launch import axes_of, joined, one_voice, place
from fastsae.train import Sweep, TrainConfig
from fastsae.train.sweep import check_groups, check_together, stored_sweep

from .finished import sweep_table
from .parse import (
    Settings,
    choice,
    read_values,
    read_words,
    training_start,
    typed,
    types_in,
    updated,
)
from .train import opened_together

STREAM = tuple(field.name for field in dataclasses.fields(StreamConfig))
NOT_OWN = ("activation", "recipe", "resume", "out", "mesh", "seed", "data_seed", *STREAM)


@dataclass(frozen=True, kw_only=True)
class SweepCommand:
    """Train several SAEs in one pass over the same activations, and compare them.

    Each SAE is an activation with its own settings, named like the options below:
    fastsae sweep topk:k=16 topk:k=32,lr=0.001 jumprelu:target_l0=32 --seeds 0 1 --steps 1000
    """

    saes: tuple[str, ...] = ()
    """The SAEs: ACTIVATION or ACTIVATION:setting=value,setting=value (true or false for switches;
    several values are quoted: 'topk:prefixes=64 256')."""

    seeds: tuple[int, ...] = ()
    """Seeds to train each SAE with (default: --seed); all see the data in the order of the
    first."""

    activation: str = "topk"
    """Activation whose options are listed below; they apply to each SAE that has them and does not
    set them itself."""

    recipe: str | None = None
    """Start from the settings of another trainer: openai, dictionary_learning, sparsify, or
    sae_lens. Other options override them."""

    out: Path = Path("runs/sweep")
    """Directory for the runs and their comparison; it must not hold another sweep."""

    resume: bool = False
    """Resume the sweep in --out from the last checkpoints of its SAEs."""

    mesh: str | None = None
    """Under torchrun, how many processes train each SAE, and how they divide it: data=1,latent=2
    makes pairs of processes that divide the latents (default: each SAE is trained by one process).
    Groups share the SAEs out; any division resumes the sweep of another."""

    report: bool = True
    """Write a page that compares the SAEs to report.html at the end."""

    config: TrainConfig = field(default_factory=TrainConfig)
    """Settings of all SAEs."""


def read_sweep(words: Sequence[str]) -> tuple[SweepCommand, dict[str, TrainConfig]]:
    """The command, whose `config` is left as it is, and the config of each of its SAEs."""
    given = read_words(words)
    start = training_start(given)
    values = read_values(SweepCommand, given, ["saes"], config=start)
    fields = {f.name for f in dataclasses.fields(SweepCommand)}
    command = SweepCommand(**{name: v for name, v in values.items() if name in fields})
    if not command.resume:
        return command, swept(command, start, values)
    if values.keys() - {"resume", "out", "mesh", "report"}:
        raise ValueError(
            f"--resume takes the SAEs and settings of {command.out}: give nothing but --out, "
            f"--mesh and --report"
        )
    return command, stored_sweep(command.out)


def main(words: Sequence[str]) -> str:
    with one_voice():
        command, configs = read_sweep(words)
        check_together(configs)  # before a model is loaded or the demo's data are made
        size = place().size
        axes = axes_of(command.mesh or "data=1", place(), several=True)
        if all(config.stream is None for config in configs.values()):  # else it may have more SAEs
            check_groups(len(configs), size, axes.size)
    with joined(f"data={size}", next(iter(configs.values())).device) as shards:
        group = shards.part(axes.data, axes.latent)
        configs, source = opened_together(configs, shards)
        sweep = Sweep(configs, source, command.out, shards=shards, group=group)
        table = sweep_table(sweep, command.resume, command.report)
        return "" if shards.rank else table


def swept(command: SweepCommand, start: Settings, values: Settings) -> dict[str, TrainConfig]:
    """The config of each SAE and seed, by the name of its folder.

    Args:
        start: the settings of all before anything is given.
        values: those that are given for all.
    """
    if not command.saes:
        raise ValueError("name the SAEs to train, such as: fastsae sweep topk:k=16 topk:k=32")
    configs: dict[str, TrainConfig] = {}
    for text in command.saes:
        for seed in command.seeds or (values.get("seed", start["seed"]),):
            name = re.sub(r"[^A-Za-z0-9._=-]+", "-", text).strip("-.")
            name += f"-seed{seed}" if len(command.seeds) > 1 else ""
            if name in configs:
                raise ValueError(f"{text} with seed {seed} is given twice")
            configs[name] = described(text, start, values | {"seed": seed})
    for setting in values.keys() & vars(start["activation"]).keys():
        if not any(hasattr(config.activation, setting) for config in configs.values()):
            raise ValueError(f"none of {', '.join(command.saes)} has the setting {setting}")
    return configs


def described(text: str, start: Settings, values: Settings) -> TrainConfig:
    """The config of an SAE such as topk:k=16,lr=0.001, on top of what is given for all."""
    activation, _, settings = text.partition(":")
    given = {}
    for setting in filter(None, settings.split(",")):
        name, equals, value = setting.partition("=")
        name = name.replace("-", "_")
        if not equals:
            raise ValueError(f"{text}: {setting!r} must be setting=value")
        if name in NOT_OWN:
            raise ValueError(f"{text}: {name} cannot be set per SAE in a sweep")
        if name in given:
            raise ValueError(f"{text}: {name} is given twice")
        given[name] = value.split()
    plain, special = choice(activation)
    before = start | {"activation": plain}
    try:
        own = special | typed([*given.items()], types_in(TrainConfig, before))
        return TrainConfig(**updated(TrainConfig, before, values | own))
    except ValueError as error:
        raise ValueError(f"{text}: {error}") from error
