"""Recipes: the default settings of other trainers, as baselines."""

import math
from typing import Any

from fastsae.losses import Objective
from fastsae.nn import Init

from .config import TrainConfig
from .optim import Optimizer

RECIPES = ("openai", "dictionary_learning", "sparsify", "sae_lens")


def recipe(name: str, d_sae: int | None = None, batch_size: int | None = None) -> TrainConfig:
    """The settings that a trainer has by default for TopK SAEs with d_sae latents.

    openai: arXiv:2406.04093; the other ones are the libraries of these names. What is kept: their
    initialization, loss, optimizer and treatment of dead latents. Where theirs is a choice (Adam or
    signum in sparsify), it is Adam. ValueError for an unknown name.
    """
    return TrainConfig(**recipe_settings(name, d_sae, batch_size))


def recipe_settings(
    name: str, d_sae: int | None = None, batch_size: int | None = None
) -> dict[str, Any]:
    """The arguments of TrainConfig that make a recipe, not yet checked together."""
    usual = TrainConfig()
    d_sae, batch_size = d_sae or usual.d_sae, batch_size or usual.batch_size
    shared: dict[str, Any] = {"d_sae": d_sae, "batch_size": batch_size}
    if d_sae < 1:
        raise ValueError(f"d_sae must be at least 1, got {d_sae}")
    tied = Init(start_l0=0.0)
    rule = 2e-4 / math.sqrt(d_sae / 2**14)
    if name == "openai":
        optimizer = Optimizer(lr=1e-4, warmup=0, decay=0.0, ema=0.999)
        return dict(
            **shared,
            init=tied,
            objective=Objective(error="fvu"),
            optimizer=optimizer,
            dead_after=10_000_000,
        )
    if name == "dictionary_learning":
        return dict(
            **shared,
            init=tied,
            objective=Objective(error="sse"),
            optimizer=Optimizer(lr=rule, warmup=1000, eps=1e-8, clip=1.0),
            dead_after=10_000_000,
        )
    if name == "sparsify":
        return dict(
            **shared,
            init=Init(encoder="linear", b_dec="mean", start_l0=0.0),
            objective=Objective(error="fvu", auxk_coef=0.0),
            optimizer=Optimizer(lr=rule, warmup=0, decay=0.0, eps=1e-8),
        )
    if name == "sae_lens":
        return dict(
            **shared,
            by_norm=True,
            init=Init(row_norm=0.1, b_dec="zero", start_l0=0.0),
            objective=Objective(error="sse", auxk_coef=1.0, auxk_error="absolute"),
            optimizer=Optimizer(
                lr=3e-4, warmup=0, decay=0.0, eps=1e-8, clip=1.0, constraint="none"
            ),
            dead_after=1000 * batch_size,
        )
    raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {name!r}")
