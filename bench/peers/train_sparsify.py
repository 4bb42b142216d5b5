"""Trains with EleutherAI's sparsify: its Trainer, on a model whose one layer yields the batches."""

import copy
import os
from collections.abc import Iterator
from functools import partial
from itertools import chain
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

import fastsae

from .task import Code, Stream, Task, Trained

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


def code(sae: Any, d_sae: int, x: Tensor) -> tuple[Tensor, Tensor]:
    out = sae(x)
    active = torch.zeros(len(x), d_sae, dtype=torch.bool, device=x.device)
    return out.sae_out, active.scatter(1, out.latent_indices, out.latent_acts != 0)


def snapshot(trainer: Any, d_sae: int) -> Code:
    """The Code of the SAE as it would be saved now: of weights that a schedule-free optimizer keeps
    averaged. The trainer's own do not change."""
    sae, free = trainer.saes["layer"], [o for o in trainer.optimizers if hasattr(o, "eval")]
    before = copy.deepcopy(sae.state_dict())
    for optimizer in free:
        optimizer.eval()
    now = partial(code, copy.deepcopy(sae), d_sae)
    for optimizer in free:
        optimizer.train()
    sae.load_state_dict(before)
    return now


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
        stream.code = partial(snapshot, trainer, task.d_sae)
        (group,) = trainer.optimizers[0].param_groups
        lr = group.get("initial_lr", group["lr"])
        trainer.fit()
        sae = sparsify.SparseCoder.load_from_disk(f"{folder}/unnamed/layer", device=task.device)

    return Trained(partial(code, sae, task.d_sae), lr, warmup if optimizer == "adam" else 0)
