"""fastsae: its Trainer; or for train_dense.py, the dense PyTorch trainer of bench/quality.py."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from bench.quality import train_dense
from fastsae.data import Batch, Cursor
from fastsae.nn import TopKConfig
from fastsae.train import Optimizer, TrainConfig, Trainer
from fastsae.train.plan import Plan

from .stream import Stream
from .task import Task, Trained


class Handed:
    """As much of an ActivationSource as a run needs, with the batches of a stream."""

    mean_square, fingerprint, heldout = 1.0, "handed", None

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
    def batches(self, *order: Any, **loading: Any) -> Iterator[Iterator[Batch]]:
        nowhere = Cursor(), np.empty(0, np.int64)
        yield (Batch(x, *nowhere) for x in self.stream)


def train(
    task: Task,
    stream: Stream,
    *,
    encoder_precision: Literal["fp32", "bf16"] = "fp32",
    dense: bool = False,
) -> Trained:
    """All other settings are the defaults."""
    source: Any = Handed(stream)
    with TemporaryDirectory() as folder:
        config = TrainConfig(
            out=Path(folder) / "run",
            d_sae=task.d_sae,
            activation=TopKConfig(k=task.k),
            optimizer=Optimizer(lr=task.lr),
            steps=task.steps,
            batch_size=task.tokens,
            device=cast(Literal["cpu", "cuda"], task.device),
            encoder_precision=encoder_precision,
        )
        plan = Plan.of(config, source.d_in, source.n_tokens)
        sae = train_dense(config, source) if dense else Trainer(config, source).fit()
    sae.to(task.device)

    def code(x: Tensor) -> tuple[Tensor, Tensor]:
        codes = sae.encode(x)
        return sae.decode(codes), torch.as_tensor(codes.active.sum(1))

    return Trained(code, plan.lr, plan.warmup)
