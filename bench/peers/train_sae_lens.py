"""Trains with SAELens: its SAETrainer with a TopKTrainingSAE."""

from functools import partial
from typing import Any

from sae_lens import saes  # pyright: ignore[reportMissingImports]
from sae_lens.config import SAETrainerConfig  # pyright: ignore[reportMissingImports]
from sae_lens.training.sae_trainer import SAETrainer  # pyright: ignore[reportMissingImports]

import fastsae

from .task import Stream, Task, Trained, code_of


def train(task: Task, stream: Stream, *, accelerate: bool = False, **settings: Any) -> Trained:
    """Other settings are the library's defaults: Adam at 3e-4, without warm-up."""
    settings |= {"d_in": task.d_in, "d_sae": task.d_sae, "k": task.k, "device": task.device}
    sae = saes.TopKTrainingSAE(saes.TopKTrainingSAEConfig(**settings))
    if accelerate:
        fastsae.accelerate(sae)
    stream.code = partial(code_of, sae)
    config = SAETrainerConfig(
        total_training_samples=task.steps * task.tokens,
        train_batch_size_samples=task.tokens,
        device=task.device,
        lr_end=0.0,  # required, but not used with a constant learning rate
        **({} if task.lr is None else {"lr": task.lr}),
    )
    SAETrainer(config, sae, stream).fit()
    return Trained(code_of(sae), config.lr, config.lr_warm_up_steps)
