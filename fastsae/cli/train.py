"""fastsae train: one SAE."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastsae.data import ActivationShards, Joined, demo_shards
from fastsae.device import choose_device
from fastsae.files import read_json
from fastsae.interop import load
from fastsae.nn import SAE, ActivationConfig, Init
from fastsae.train import Optimizer, TrainConfig, Trainer, resumed_config, stored_config
from fastsae.train.summary import Summary, read_results
from fastsae.upgrade import constraint_of

from .parse import (
    Given,
    Settings,
    converted,
    filled,
    option,
    read_words,
    training_start,
    with_activation,
)


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a sparse autoencoder.

    Without --data, it trains on demo activations, harvested once and cached: a complete run in a
    few minutes on two CPU cores. With --activation NAME, --help-all lists the options of that
    activation.
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
    """Resume the run in --out from its last checkpoint, with its settings. With --steps N, it
    trains to step N: Adam's state is kept, and the learning-rate schedule is that of a run of N
    steps, so that a rate that had decayed rises again."""

    config: TrainConfig = field(default_factory=TrainConfig)
    """Run."""


def read_train(words: Sequence[str], sae: SAE | None = None) -> Train:
    """The command, with the settings of the SAE to start from or of the run to be resumed."""
    given = read_words(words)
    if sae is not None:
        given.insert(0, ("d_sae", [str(sae.d_sae)]))  # also for the recipe
    start, named = training_start(given), dict(given)
    if sae is not None:
        start |= settings_of(sae, start["optimizer"])
        start["activation"] = with_penalty(sae.activation.cfg, named)
        if unused := [name for name in ("activation", "threshold", *vars(Init())) if name in named]:
            raise ValueError(f"{option(unused[0])} has no effect with --start-from: leave it out")
    command = filled(Train, given, config=start)
    if not command.resume:
        return command
    out = command.config.out
    for name in ("recipe", "start_from"):
        if getattr(command, name) is not None:
            raise ValueError(f"--resume takes the settings of {out}: no {option(name)}")
    start = vars(stored_config(out))
    if "activation" in named:
        start = with_activation(start, command.activation)
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


def main(words: Sequence[str]) -> str:
    sae = start_from(read_words(words))
    command = read_train(words, sae)
    config = command.config
    Trainer(config, source_of(config), sae).fit(command.resume)
    return run_table(config.out)


def source_of(config: TrainConfig) -> ActivationShards | Joined:
    """What a run reads: its data, side by side with its targets or further layers."""
    device = choose_device(config.device)  # before minutes are spent on the demo's data
    first = demo_shards(device=device) if config.data is None else ActivationShards(config.data)
    target = () if config.target is None else (config.target,)
    further = [ActivationShards(path) for path in (*target, *config.layers)]
    return Joined(first, *further) if further else first


def trained_with(folder: Path) -> TrainConfig | None:
    """The config of the run in a folder; None where there is another's SAE."""
    path = folder / "config.json"
    stored = read_json(path) if path.exists() else None
    return stored_config(folder) if isinstance(stored, dict) and stored.get("config") else None


def run_table(out: Path) -> str:
    """A finished run in a few lines: its metrics and where its files are."""
    found = read_results(Summary, out / "summary.json")
    curves = out / "curves.png"
    rows = {
        "FVU": f"{found['fvu']:.4f}  (fraction of variance unexplained, "
        f"on {found['evaluated_on']})",
        "L0": f"{found['l0']:.1f}  (active latents per token)",
        "dead": f"{found['dead_fraction']:.2%}  (latents never active on these "
        f"{found['evaluated_tokens']:,} tokens)",
        "tokens": f"{found['tokens']:,}, {found['tokens_per_second']:,.0f} per second",
        "time": f"{found['seconds']:.0f} s  ({found['step_path']} step)",
        **({"ended": f"early: {found['ended_early']}"} if "ended_early" in found else {}),
        "SAE": f"{out / 'sae'}  (fastsae.load({str(out / 'sae')!r}))",
        "SAELens": found["sae_lens"],
        "metrics": f"{out / 'summary.json'}, {out / 'metrics.jsonl'}",
        "curves": str(curves) if curves.exists() else "none: pip install 'fastsae-triton[report]'",
        "next": f"fastsae eval {out}",
    }
    return "\n".join(f"  {name:<8} {text}" for name, text in rows.items())
