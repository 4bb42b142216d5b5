"""fastsae train: one SAE."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastsae.data import Joined, StoredActivations, Stream, demo_shards, open_path
from fastsae.device import choose_device
from fastsae.distributed.launch import joined, one_voice, place
from fastsae.interop import load
from fastsae.meeting import everywhere
from fastsae.memory import memory_left
from fastsae.nn import SAE, ActivationConfig, Init
from fastsae.shards import Shards
from fastsae.train import (
    Optimizer,
    Sweep,
    TrainConfig,
    Trainer,
    resumed_config,
    stored_config,
)
from fastsae.train.forecast import timed
from fastsae.train.run_table import run_table
from fastsae.train.sweep import stored_sweep
from fastsae.upgrade import constraint_of

from .finished import ReportAtEnd, sweep_table
from .parse import (
    Given,
    Settings,
    converted,
    filled,
    option,
    read_words,
    training_start,
    typed,
    with_activation,
)


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a sparse autoencoder.

    With --data, it trains on stored activations, with --model on those of a model as it runs over
    --text or --dataset: one SAE for each --hookpoint. Without either, it trains on demo
    activations, harvested once and cached: a complete run in a few minutes on two CPU cores.

    With --activation NAME, --help-all lists the options of that activation.
    """

    activation: str = "topk"
    """topk, batchtopk, jumprelu, relu, gated, rational, variational, abstopk, or batchabstopk."""

    recipe: str | None = None
    """Start from the settings of another trainer: openai, dictionary_learning, sparsify, or
    sae_lens. Other options override them."""

    start_from: str | None = None
    """Start from the weights of a trained SAE: its directory or file, from fastsae or another
    library, or its id on the Hugging Face Hub. It sets the activation, --d-sae and whether decoder
    rows have norm 1; the optimizer starts from zero."""

    resume: bool = False
    """Resume the run in --out from its last checkpoint, with its settings (auto: start it if there
    is none). With --steps N, it trains to step N: Adam's state is kept, and the learning rate's
    schedule is that of N steps, so that a decayed rate rises again."""

    report: bool = True
    """Write a report on the SAE to report.html at the end, as `fastsae report RUN --no-lens` does;
    `fastsae report RUN` adds the logit lens, for which it loads the model."""

    mesh: str | None = None
    """Under torchrun, how many processes divide the tokens of a batch, and the latents:
    data=2,latent=8 (default: the processes of a machine divide the latents, machines the tokens).
    They all need the same data and --out. The result is that of one process, up to rounding; any
    mesh resumes the run of another."""

    config: TrainConfig = field(default_factory=TrainConfig)
    """Run."""


def read_train(words: Sequence[str], sae: SAE | None = None) -> Train:
    """The command, with the settings of the SAE to start from or of the run to be resumed."""
    given = settled(read_words(words))
    if sae is not None:
        given.insert(0, ("d_sae", [str(sae.d_sae)]))  # also for the recipe
    start, named = training_start(given), dict(given)
    if sae is not None:
        start |= settings_of(sae, start["optimizer"])
        start["activation"] = with_penalty(sae.activation.cfg, named)
        if unused := [name for name in ("activation", "threshold", *vars(Init())) if name in named]:
            raise ValueError(f"{option(unused[0])} has no effect with --start-from: leave it out")
    if "resume" not in named or named["resume"] == ["false"]:
        return filled(Train, given, config=start)
    out = converted("--out", Path, named["out"][:1]) if "out" in named else TrainConfig().out
    for name in ("recipe", "start_from"):
        if name in named:
            raise ValueError(f"--resume takes the settings of {out}: no {option(name)}")
    start = vars(stored_config(out))
    if "activation" in named:
        start = with_activation(start, converted("--activation", str, named["activation"][:1]))
    command = filled(Train, given, config=start)
    resumed_config(command.config)
    return command


def start_from(given: Given) -> SAE | None:
    """The SAE that training is to start from, if it is given."""
    source = dict(given).get("start_from", ["none"])
    found = converted("--start-from", str | None, source[:1])
    return None if found is None else load(found).float()


def with_penalty(cfg: ActivationConfig, named: Mapping[str, Any]) -> ActivationConfig:
    """The settings of the activation to start from; ValueError if they have no sparsity penalty, as
    in other libraries' files, and none is given."""
    for name in ("l1_coef", "l0_coef"):
        if getattr(cfg, name, None) == 0.0 and name not in named:
            if "target_l0" not in named:
                raise ValueError(
                    "the SAE to start from has no sparsity penalty: give --target-l0 or "
                    f"{option(name)}"
                )
            return dataclasses.replace(cfg, **{name: None})
    return cfg


def settings_of(sae: SAE, optimizer: Optimizer) -> Settings:
    """The settings of training that an SAE to start from determines, apart from d_sae."""
    return {
        "by_norm": sae.by_norm and sae.layers == 1,  # crosscoders always do
        "layer_norm": sae.layer_norm,
        "skip": sae.W_skip is not None,
        "activation": sae.activation.cfg,
        "init": Init(),
        "optimizer": dataclasses.replace(optimizer, constraint=constraint_of(sae)),
    }


def settled(given: Given) -> Given:
    """The same with --resume auto replaced by whether there is a run to be resumed."""
    out = Path(*dict(given).get("out", [str(TrainConfig().out)])[:1])
    begun = any((out / name).exists() for name in ("config.json", "sweep.json"))
    auto = [str(begun).lower()]
    return [(n, auto if n == "resume" and words == ["auto"] else words) for n, words in given]


def main(words: Sequence[str]) -> str:
    given = settled(read_words(words))
    if place().size > 1 or "mesh" in dict(given):
        return main_of_many(words)
    out = resumed_sweep(given)
    if out is not None:
        configs, source = opened(stored_sweep(out))
        report = typed(given, {"resume": bool, "out": Path, "report": bool}).get("report", True)
        return sweep_table(Sweep(configs, source, out), True, report)
    sae = start_from(given)
    command = read_train(words, sae)
    configs, source = opened({"": command.config})
    if len(configs) > 1:
        if sae is not None:
            raise ValueError(f"--start-from needs one hookpoint, got {len(configs)}")
        sweep = Sweep(configs, source, command.config.out)
        return sweep_table(sweep, command.resume, command.report)
    (config,) = configs.values()
    callbacks = [ReportAtEnd()] if command.report else []
    trainer = Trainer(config, source, sae, callbacks)
    trainer.forecast = timed(trainer.forecast)
    trainer.fit(command.resume)
    return run_table(config.out)


def main_of_many(words: Sequence[str]) -> str:
    """One SAE, in the processes that torchrun has started; process 0 returns the table."""
    with one_voice():
        command = read_train(words)
        if command.start_from is not None:
            raise ValueError("--start-from needs one process")
    config = command.config
    with joined(command.mesh, config.device) as shards:
        configs, source = opened_together({"": config}, shards)
        if len(configs) > 1:
            raise ValueError(
                f"many processes train at one hookpoint, got {len(configs)}: fastsae sweep shares "
                f"several out"
            )
        (config,) = configs.values()
        Trainer(config, source, shards=shards).fit(command.resume)
        return "" if shards.rank else run_table(config.out)


def opened_together(
    configs: dict[str, TrainConfig], shards: Shards
) -> tuple[dict[str, TrainConfig], StoredActivations | Stream]:
    """What `opened` returns, once it has returned on process 0, which may harvest the demo's data,
    and finds the size of a stream's buffer for all, which each has the memory for."""
    memory = min(shards.all_of(memory_left("cpu", place().local_size)))  # also on other machines
    found = everywhere(shards, lambda: opened(configs, memory=memory) if shards.rank == 0 else None)
    first = next(iter(found[0].values())).stream if found else None
    if tokens := shards.all_of(first and first.buffer_tokens)[0]:
        streams = {name: config.stream for name, config in configs.items() if config.stream}
        sized = {n: dataclasses.replace(s, buffer_tokens=tokens) for n, s in streams.items()}
        configs = {n: dataclasses.replace(configs[n], stream=s) for n, s in sized.items()}
    return everywhere(shards, lambda: found or opened(configs))


def resumed_sweep(given: Given) -> Path | None:
    """The folder to resume, if it is that of a run at several hookpoints."""
    values = dict(given)
    out = Path(*values.get("out", [])[:1])
    if "resume" not in values or not (out / "sweep.json").exists():
        return None
    if values.keys() - {"", "resume", "out", "report", "no_report"}:
        raise ValueError(
            f"--resume takes the settings of {out}: give nothing but --out and --report"
        )
    return out


def opened(
    configs: dict[str, TrainConfig], *, fill: bool = True, memory: int | None = None
) -> tuple[dict[str, TrainConfig], StoredActivations | Stream]:
    """What SAEs of one sweep are trained on. Of a stream with several hookpoints, each SAE becomes
    one for each hookpoint. Unless its buffer is to be filled, it may be larger than memory,
    of which it may use at most `memory` bytes."""
    first = next(iter(configs.values()))
    if first.stream is None:
        if any(config.downstream != "none" for config in configs.values()):
            raise ValueError("--downstream needs --model, which it runs")
        return configs, source_of(first)
    asked = [c.stream.hookpoints for c in configs.values() if c.stream is not None]
    union = tuple(dict.fromkeys(name for names in asked for name in names))
    further = [str(path) for path in (first.target, *first.layers) if path is not None]
    whole = dataclasses.replace(first.stream, hookpoint=union).resolved()
    stream, source = whole.open(choose_device(first.device), further, fill=fill, memory=memory)
    paths = [Path(name) for name in source.hookpoints[len(stream.hookpoints) :]]
    if further and len(stream.hookpoints) > 1:
        raise ValueError(f"a target or layers need one hookpoint, got {len(stream.hookpoints)}")
    if first.target is not None and len(paths) > 1:
        raise ValueError(f"a target must be one hookpoint, got {len(paths)} at {first.target}")
    found: dict[str, TrainConfig] = {}
    for (name, config), own in zip(configs.items(), asked, strict=True):
        sites = own if own != union else stream.hookpoints  # a resumed SAE has one of them
        for site in sites:
            label = "-".join([site] * (len(sites) > 1) + [name] * bool(name))
            found[label] = dataclasses.replace(
                config,
                stream=dataclasses.replace(stream, hookpoint=site),
                target=None if config.target is None else paths[0],
                layers=tuple(paths) if config.layers else (),
            )
    return found, source


def source_of(config: TrainConfig) -> StoredActivations:
    """The data that a run reads, side by side with its targets or further layers."""
    device = choose_device(config.device)  # before minutes are spent on the demo's data
    first = demo_shards(device=device) if config.data is None else open_path(config.data)
    target = () if config.target is None else (config.target,)
    further = [open_path(path) for path in (*target, *config.layers)]
    return Joined(first, *further) if further else first
