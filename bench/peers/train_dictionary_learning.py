"""Trains with dictionary_learning: its trainSAE with a TopKTrainer."""

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dictionary_learning.trainers import top_k  # pyright: ignore[reportMissingImports]
from dictionary_learning.training import trainSAE  # pyright: ignore[reportMissingImports]

import fastsae
from fastsae.files import read_json

from .task import Stream, Task, Trained, code_of


def train(task: Task, stream: Stream, *, accelerate: bool = False) -> Trained:
    """Other settings are the library's defaults: Adam at 2e-4 / sqrt(d_sae / 16384)."""

    def build(*sizes: int) -> Any:
        built = top_k.AutoEncoderTopK(*sizes)
        stream.code = partial(code_of, built)
        return fastsae.accelerate(built) if accelerate else built

    settings: dict[str, Any] = {"trainer": top_k.TopKTrainer, "dict_class": build, "k": task.k}
    settings |= {"activation_dim": task.d_in, "dict_size": task.d_sae, "steps": task.steps}
    settings |= {"lr": task.lr, "warmup_steps": task.warmup(default=1000), "device": task.device}
    settings |= {"layer": 0, "lm_name": "unknown"}
    with TemporaryDirectory() as folder:
        trainSAE(stream, [settings], task.steps, save_dir=folder, device=task.device)
        saved = Path(folder) / "trainer_0"
        used = read_json(saved / "config.json")["trainer"]
        sae = top_k.AutoEncoderTopK.from_pretrained(saved / "ae.pt", device=task.device)
    return Trained(code_of(sae), used["lr"], used["warmup_steps"])
