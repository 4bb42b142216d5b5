"""Trains with EleutherAI's sparsify: its Trainer, on a model whose one layer yields the batches."""

import os
from collections.abc import Iterator
from itertools import chain
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

import fastsae

from .task import Stream, Task, Trained

if not torch.cuda.is_available():
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # it uses Triton if installed, even without a GPU

import sparsify  # pyright: ignore[reportMissingImports]  # noqa: E402


class Layer(nn.Module):
    """Returns the next batch of activations, whatever the input tokens are."""

    def __init__(self, activations: Iterator[Tensor]):
        super().__init__()
        self.activations = activations

    def forward(self, input_ids: Tensor) -> Tensor:
        return next(self.activations).unflatten(0, input_ids.shape)


class Model(PreTrainedModel):
    """The part of a language model that the Trainer needs: a layer to hook, and a device."""

    config_class = PretrainedConfig

    def __init__(self, activations: Iterator[Tensor], device: str):
        super().__init__(PretrainedConfig())
        self.layer = Layer(activations)
        self.place = nn.Parameter(torch.empty(0, device=device))

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        """Input of the Trainer's first call, which finds the width of the activations."""
        return {"input_ids": torch.zeros(1, 1, dtype=torch.long)}

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.layer(input_ids)


def train(task: Task, stream: Stream, *, optimizer: Any, accelerate: bool = False) -> Trained:
    """Other settings are the library's defaults; returns the SAE that it saved."""
    model = Model(chain([torch.zeros(1, task.d_in)], stream), task.device)
    warmup = task.warmup(default=1000)
    # One sequence per step; the model ignores its tokens.
    sequences: Any = [{"input_ids": torch.zeros(task.tokens, dtype=torch.long)}] * task.steps
    with TemporaryDirectory() as folder:
        settings: dict[str, Any] = {"optimizer": optimizer, "lr": task.lr, "save_dir": folder}
        settings |= {"lr_warmup_steps": warmup, "hookpoints": ["layer"], "log_to_wandb": False}
        coder = sparsify.SparseCoderConfig(num_latents=task.d_sae, k=task.k)
        config = sparsify.TrainConfig(coder, batch_size=1, **settings)
        trainer = sparsify.Trainer(config, sequences, model)
        if accelerate:
            fastsae.accelerate(trainer.saes["layer"])
        (group,) = trainer.optimizers[0].param_groups
        lr = group.get("initial_lr", group["lr"])
        trainer.fit()
        sae = sparsify.SparseCoder.load_from_disk(f"{folder}/unnamed/layer", device=task.device)

    def code(x: Tensor) -> tuple[Tensor, Tensor]:
        out = sae(x)
        active = torch.zeros(len(x), task.d_sae, dtype=torch.bool, device=x.device)
        return out.sae_out, active.scatter(1, out.latent_indices, out.latent_acts != 0)

    return Trained(code, lr, warmup if optimizer == "adam" else 0)
