"""dictionary_learning: its trainSAE with a TopKTrainer."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dictionary_learning.trainers.top_k import (  # pyright: ignore[reportMissingImports]
    AutoEncoderTopK,
    TopKTrainer,
)
from dictionary_learning.training import trainSAE  # pyright: ignore[reportMissingImports]
from torch import Tensor

import fastsae
from fastsae.files import read_json

from .task import Stream, Task, Trained


def accelerated(*sizes: int) -> AutoEncoderTopK:
    return fastsae.accelerate(AutoEncoderTopK(*sizes))


def train(task: Task, stream: Stream, *, accelerate: bool = False) -> Trained:
    """All other settings are the defaults: Adam at 2e-4 / sqrt(d_sae / 16384)."""
    settings: dict[str, Any] = {
        "trainer": TopKTrainer,
        "dict_class": accelerated if accelerate else AutoEncoderTopK,
        "steps": task.steps,
        "activation_dim": task.d_in,
        "dict_size": task.d_sae,
        "k": task.k,
        "lr": task.lr,
        "warmup_steps": task.warmup(default=1000),
        "device": task.device,
        "layer": 0,
        "lm_name": "unknown",
    }
    with TemporaryDirectory() as folder:
        trainSAE(stream, [settings], task.steps, save_dir=folder, device=task.device)
        saved = Path(folder) / "trainer_0"
        used = read_json(saved / "config.json")["trainer"]
        sae = AutoEncoderTopK.from_pretrained(saved / "ae.pt", device=task.device)

    def code(x: Tensor) -> tuple[Tensor, Tensor]:
        recon, codes = sae(x, output_features=True)
        return recon, codes != 0

    return Trained(code, used["lr"], used["warmup_steps"])
