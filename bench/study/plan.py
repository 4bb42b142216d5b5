"""What the study trains: data sets, methods and their regimes, seeds and scale.

A method is what `fastsae train` is told, and its regime is part of its name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from fastsae.cli.train import read_train
from fastsae.data import ActivationShards, ActivationSource, Synthetic, demo_shards
from fastsae.train import TrainConfig
from fastsae.train.optim import default_lr
from fastsae.upgrade import UpgradeConfig

SEEDS, TUNING_SEED = (0, 1, 2, 3, 4), 100


@dataclass(frozen=True)
class Scale:
    """The size of the study's runs and evaluations."""

    steps: int = 300
    """Training steps from scratch."""
    tune_steps: int = 90
    """Fine-tuning steps of upgrades and their teachers."""
    batch_size: int = 1024
    tokens: int = 26_000
    """Held-out tokens of an evaluation."""
    windows: int = 16
    """Windows of text in which SmolLM2's cross-entropy is measured."""


class Method(NamedTuple):
    """A way to train an SAE."""

    options: str
    """Options of `fastsae train`."""
    expansion: float = 4.0
    """Latents per dimension of the data."""
    lr: float | None = 1.0
    """Factor of the default learning rate; None for the best power of 2 on TUNING_SEED."""

    def config(self, d_in: int, seed: int, scale: Scale, factor: float) -> TrainConfig:
        """The run's configuration, with this factor on the learning rate; checkpoints only its end.

        Batches are the same for all seeds and methods.
        """
        d_sae = round(self.expansion * d_in)
        size = f"--d-sae {d_sae} --steps {scale.steps} --batch-size {scale.batch_size}"
        lr = factor * default_lr(d_sae, scale.steps, scale.batch_size)
        rate = f"--lr {lr} --seed {seed} --data-seed 0"
        rare = f"--log-every 50 --checkpoint-every {10 * scale.steps}"
        return read_train(f"{self.options} {size} {rate} {rare}".split()).config


class Upgrade(NamedTuple):
    """A rational activation for a method's SAE."""

    teacher: str
    settings: dict[str, Any]
    """Of UpgradeConfig."""
    rate: float | None = None
    """That of PerLatentConfig, if each latent has a function."""

    def config(self, seed: int, scale: Scale) -> UpgradeConfig:
        """The upgrade's configuration, with checkpoints only at its end."""
        steps = scale.tune_steps
        run: dict[str, Any] = {"steps": steps, "batch_size": scale.batch_size, "seed": seed}
        return UpgradeConfig(lr=2e-4, checkpoint_every=10 * steps, **run, **self.settings)


class Data(NamedTuple):
    """A source of activations, and what is trained on it."""

    open: Callable[[Path], ActivationSource]
    methods: dict[str, Method]
    upgrades: dict[str, Upgrade] = {}
    causal: bool = False
    """Whether it is of a causal language model, whose predictions are then measured too."""


# --- methods by the claim that they settle --------------------------------------------------

USUAL = 32, 4.0
"""The usual k and latents per dimension."""
EXPANSIONS = 4.0, 0.5, 1.0, 16.0
"""Latents per dimension in the map, the usual ones first."""
MAP = [(k, x) for x in EXPANSIONS for k in (128, 32, 64, 16, 192) if (k, x) != USUAL]
"""The other cells of the map."""
WIDE = 38, 16.0
"""The paper's own: a tenth of the width, and 16 latents per dimension."""
BATCHWISE = [(k, x) for x in EXPANSIONS for k in (32, 128)]
"""Cells in which a batch shares its active latents out, too."""
TENTH, THIRD, EIGHT = (58, 4.0), (192, 4.0), (8, 4.0)
"""A tenth and a third of SmolLM2's width; as many as are active in planted data."""
ROOM = {"lr x7.5": 7.5, "lr x1": 1.0, "lr x6": 6.0, "lr x4": 4.0}
"""Factors of the learning rate at which about 70, 0, 50 and 30 % of the latents die in a TopK SAE
without aux-k."""
UNTIED = "--k 16 --encoder linear --constraint none"
ROTATIONS = {
    "TopK": "--auxk-coef 0",
    "TopK with aux-k": "",
    "RT dense": "--auxk-coef 0 --gradient rotation --rotation dense",
    "RT support": "--auxk-coef 0 --gradient rotation --rotation support",
}
VARIATIONAL = {
    "TopK, no aux-k": "--auxk-coef 0",
    "vSAE, beta 0.5": "--activation variational --beta 0.5 --auxk-coef 0",
    "vSAE, learned variance, beta 0.5":
        "--activation variational --variance learned --noise token --beta 0.5 --auxk-coef 0",
    "TopK, aux-k": "",
    "vSAE, aux-k, beta 0.5": "--activation variational --beta 0.5",
    "vSAE, beta 1": "--activation variational --beta 1 --auxk-coef 0",
    "vSAE, beta 0.03": "--activation variational --beta 0.03 --auxk-coef 0",
}  # fmt: skip
TEACHERS = {
    "ReLU": "--activation relu --target-l0 32",
    "TopK": "--k 32",
    "JumpReLU": "--activation jumprelu --target-l0 32 --threshold 1 --bandwidth 0.5",
}
PATHS: dict[str, dict[str, Any]] = {
    "RSAE of": {},
    "RSAE, paper's path, of": {"path": "paper"},
    "scale and shift of": {"degree": (1, 0)},
}
PER_LATENT: dict[str, tuple[dict[str, Any], float]] = {
    "RSAE per latent of": ({}, 1.0),
    "RSAE per latent, 50 x rate, of": ({}, 50.0),
    "scale and shift per latent, 50 x rate, of": ({"degree": (1, 0)}, 50.0),
}
"""A function for each latent, with PerLatentConfig's rate."""


def at(k: int, expansion: float) -> str:
    return f"k={k}, x{expansion:g}"


def tied(options: dict[str, str], **changes: Any) -> dict[str, Method]:
    """Methods whose encoder starts as the decoder's copy."""
    return {name: Method(f"--encoder tied {o}", **changes) for name, o in options.items()}


def abs_top_k(*cells: tuple[int, float], batch: str = "") -> dict[str, Method]:
    """AbsTopK and TopK, each at its best learning rate."""
    methods = {}
    for k, x in cells:
        for name in (f"{batch}TopK", f"{batch}AbsTopK"):
            options = f"--activation {name.lower()} --k {k} --encoder tied"
            methods[f"{name}, {at(k, x)}"] = Method(options, x, None)
    return methods


def upgrades(*teachers: str) -> dict[str, Upgrade]:
    return {f"{path} {t}": Upgrade(t, PATHS[path]) for t in teachers for path in PATHS}


def upgrades_per_latent(*teachers: str) -> dict[str, Upgrade]:
    return {f"{path} {t}": Upgrade(t, *PER_LATENT[path]) for t in teachers for path in PER_LATENT}


def relative(k: int) -> dict[str, Method]:
    return tied({"TopK, log_fvu": f"--k {k}", "TopK, fvu": f"--k {k} --error fvu"}, lr=None)


ROTATION = {
    f"{name}, untied, {label}": Method(f"{UNTIED} {options}", 4 / 3, factor)
    for label, factor in ROOM.items()
    for name, options in ROTATIONS.items()
}

# --- data -----------------------------------------------------------------------------------

PLANTED: dict[str, Any] = {"n_latents": 1024, "active": 8, "noise": 0.02}
PLANTED |= {"d_in": 256, "frequency_exponent": 0.5, "n_tokens": 600_000}


class Planted(Synthetic):
    """Rows that are drawn once for all runs; each takes the same half of the epoch."""

    _block = cache(Synthetic._block)


def planted(signed: float) -> Data:
    return Data(lambda _: Planted(**PLANTED, signed=signed), abs_top_k(EIGHT))


def smollm(hookpoint: str, *methods: dict[str, Method], **others: Any) -> Data:
    """SmolLM2's activations, harvested as in docs/study.md."""
    found = {name: m for some in (abs_top_k(TENTH), *methods) for name, m in some.items()}
    return Data(lambda folder: ActivationShards(folder / hookpoint), found, causal=True, **others)


DATA = {
    "MiniLM layer 3": Data(
        lambda _: demo_shards(hookpoint="encoder.layer.2"),
        abs_top_k(USUAL) | tied(TEACHERS) | tied(VARIATIONAL) | ROTATION
        | relative(USUAL[0]) | abs_top_k(*BATCHWISE, batch="Batch") | abs_top_k(*MAP, WIDE),
        upgrades(*TEACHERS) | upgrades_per_latent(*TEACHERS),
    ),
    "SmolLM2 layer 15": smollm(
        "model.layers.15", abs_top_k(THIRD), tied({"ReLU": TEACHERS["ReLU"]}), relative(TENTH[0]),
        upgrades=upgrades("ReLU"),
    ),
    "SmolLM2 layer 10": smollm("model.layers.10"),
    "SmolLM2 layer 20": smollm("model.layers.20"),
    "SmolLM2 MLP 15": smollm("model.layers.15.mlp"),
    "planted": planted(0.0),
    "planted, 30 % signed": planted(0.3),
    "planted, signed": planted(1.0),
}  # fmt: skip


def teachers(data: Data) -> set[str]:
    """The methods whose SAEs are upgraded, and fine-tuned as they are."""
    return {upgrade.teacher for upgrade in data.upgrades.values()}
