"""Trains with fastsae's Trainer."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from torch import Tensor

from fastsae.data import Batch, Cursor
from fastsae.nn import TopKConfig
from fastsae.train import Callback, TrainConfig, Trainer
from fastsae.train.plan import Plan
from fastsae.train.state import TrainState

from .task import Stream, Task, Trained, code_of


class StreamSource:
    """The part of the ActivationSource interface that a run needs, with a stream's batches."""

    fingerprint, heldout = "stream", None

    def __init__(self, stream: Stream):
        self.stream = stream
        self.n_tokens, self.d_in = stream.sample.shape

    def rows(self, indices: Tensor) -> Tensor:
        return self.stream.sample[indices]

    def where(self, row: int) -> str:
        return f"row {row}"

    def sample(self, n: int, seed: int = 0) -> Tensor:
        return self.stream.sample[:n]

    @contextmanager
    def batches(self, *order: Any, **loading: Any) -> Iterator["StreamSource"]:
        yield self

    def take(self, interrupted: Any) -> Batch:
        x = next(self.stream).clone()  # standardized in place
        return Batch(x, Cursor(), np.empty(0, np.int64))  # the rest is needed only to resume


class Watched(Callback):
    """Gives the stream the SAE as it would be saved now."""

    def __init__(self, stream: Stream):
        self.stream = stream

    def on_step(self, trainer: Trainer, state: TrainState) -> None:
        device = trainer.device
        self.stream.code = lambda: code_of(trainer.snapshot(state).to(device))


def config_of(task: Task, **options: Any) -> TrainConfig:
    """A task's TrainConfig; settings that are not given keep their defaults."""
    options |= {"d_sae": task.d_sae, "activation": TopKConfig(k=task.k), "device": task.device}
    options |= {"steps": task.steps, "batch_size": task.tokens, "seed": task.seed}
    config = TrainConfig(**options)
    lr = config.optimizer.lr if task.lr is None else task.lr
    return replace(config, optimizer=replace(config.optimizer, lr=lr))


def train(task: Task, stream: Stream, **options: Any) -> Trained:
    """Options are those of TrainConfig; the others are its defaults."""
    source: Any = StreamSource(stream)
    with TemporaryDirectory() as folder:
        config = replace(config_of(task, **options), out=Path(folder) / "run")
        sae = Trainer(config, source, callbacks=[Watched(stream)]).fit()
    plan = Plan.of(config, source.d_in, source.n_tokens)
    return Trained(code_of(sae.to(task.device)), plan.lr, plan.warmup)
