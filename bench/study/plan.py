"""Configuration of the study: methods, data sets, seeds and scale; L0 is matched across methods."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from fastsae.data import ActivationSource, Synthetic, demo_shards
from fastsae.losses import Objective
from fastsae.nn import ActivationConfig
from fastsae.train import TrainConfig
from fastsae.upgrade import UpgradeConfig

D_SAE = 4096
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Scale:
    """The size of the study's runs and evaluations."""

    steps: int = 500
    """Training steps from scratch."""
    tune_steps: int = 150
    """Fine-tuning steps of upgrades and their teachers."""
    batch_size: int = 1024
    windows: int = 64
    """Windows of text for the downstream evaluation."""


def run_options(scale: Scale, steps: int, seed: int) -> dict[str, Any]:
    """Options that training runs and upgrades share; neither saves a checkpoint on the way."""
    run = {"steps": steps, "batch_size": scale.batch_size, "seed": seed, "log_every": 50}
    return run | {"checkpoint_every": 10 * steps}


@dataclass(frozen=True)
class Data:
    """A source of activations, and the L0 of SAEs trained on it."""

    k: int
    open: Callable[[], ActivationSource]


PLANTED: dict[str, Any] = {"n_latents": 1024, "active": 8, "noise": 0.02}
PLANTED |= {"frequency_exponent": 0.5, "n_tokens": 600_000}

DATA = {
    "MiniLM layer 3": Data(32, lambda: demo_shards(hookpoint="encoder.layer.2")),
    "MiniLM layer 5": Data(32, lambda: demo_shards(hookpoint="encoder.layer.4")),
    "planted": Data(8, lambda: Synthetic(d_in=256, **PLANTED)),
}


@dataclass(frozen=True)
class Method:
    """An activation with its settings, and other changes to the default run."""

    activation: str
    settings: dict[str, Any] = field(default_factory=dict)
    auxk: bool = False
    prefixes: tuple[int, ...] = ()

    def config(self, k: int, seed: int, scale: Scale) -> TrainConfig:
        """The run's configuration; "K" among the settings stands for the data set's L0."""
        settings = {name: k if value == "K" else value for name, value in self.settings.items()}
        cfg = ActivationConfig.named(self.activation)
        coef = Objective().auxk_coef if self.auxk else 0.0
        return TrainConfig(
            d_sae=D_SAE,
            activation=cfg(**settings),
            objective=Objective(auxk_coef=coef, prefixes=self.prefixes),
            data_seed=0,
            **run_options(scale, scale.steps, seed),
        )


def top_k(activation: str = "topk", auxk: bool = False, **settings: Any) -> Method:
    return Method(activation, {"k": "K", **settings}, auxk)


METHODS = {
    "TopK": top_k(auxk=True),
    "TopK, no aux-k": top_k(),
    "AbsTopK": top_k(by="abs", auxk=True),
    "RT support": top_k(gradient="rotation", rotation="support"),
    "RT dense": top_k(gradient="rotation", rotation="dense"),
    "BatchTopK": top_k("batchtopk", auxk=True),
    "JumpReLU": Method("jumprelu", {"target_l0": "K", "threshold": 1.0, "bandwidth": 0.5}),
    "ReLU": Method("relu", {"target_l0": "K"}),
    "Gated": Method("gated", {"target_l0": "K"}),
    "Matryoshka": replace(top_k(auxk=True), prefixes=(256, 512, 1024, 2048)),
    "vSAE": top_k("variational", variance="none"),
    "vSAE, learned variance": top_k("variational", variance="learned"),
}

TEACHERS = ("TopK", "JumpReLU", "ReLU")
"""Methods whose SAEs are upgraded to rational ones, and as a baseline fine-tuned unchanged."""


def upgrade_config(seed: int, scale: Scale) -> UpgradeConfig:
    return UpgradeConfig(lr=2e-4, **run_options(scale, scale.tune_steps, seed))
