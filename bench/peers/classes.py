"""Every class that `fastsae.accelerate` supports, in the step of its library's own trainer.

Phases of training differ by how many latents are active: about half of them in a new ReLU, JumpReLU
or gated SAE, few at the end. Biases and thresholds are shifted to have that many. Classes that keep
a fixed number differ by how many latents are dead, which their auxiliary losses are about.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.problem import Size

if not torch.cuda.is_available():
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # it uses Triton if installed, even without a GPU

LONG = 1_000_000_000
"""Steps, or tokens, without an end."""


class Phase(NamedTuple):
    """A time in training, for SAEs of either kind."""

    active: float | None
    """Fraction of latents above the threshold; None as the SAE was created."""

    dead: float
    """Fraction of dead latents, of classes that keep a fixed number."""


PHASES = {"start": Phase(None, 0.0), "middle": Phase(1 / 32, 0.02), "end": Phase(1 / 128, 0.1)}


class Subject(NamedTuple):
    """An SAE and a step of its training, or of its use."""

    sae: Any
    step: Callable[[Tensor], object]

    since_fired: Tensor | None = None
    """The trainer's count of steps or tokens since each latent fired."""

    shifted: str | None = None
    """The bias, or threshold, that decides how many latents are active."""

    def enter(self, phase: Phase, x: Tensor) -> None:
        """Give it the number of active latents that it has for x in that phase."""
        if self.shifted is None or phase.active is None:
            return
        W_enc = self.sae.W_enc.T if hasattr(self.sae, "W_enc") else self.sae.encoder.weight
        with torch.no_grad():
            pre = x[:256] @ W_enc.T
            most = pre.flatten().topk(max(1, round(phase.active * pre.numel()))).values[-1]
            self.sae.get_parameter(self.shifted).fill_(
                most if "threshold" in self.shifted else -most
            )

    def run(self, phase: Phase, x: Tensor) -> None:
        """One step, with as many dead latents as the phase has."""
        if self.since_fired is not None and phase.dead:
            self.since_fired[: round(phase.dead * len(self.since_fired))] = LONG
        self.step(x)


def optimized(sae: Any, loss: Callable[[Tensor], Tensor]) -> Callable[[Tensor], None]:
    """A step of a training loop of one's own."""
    adam = torch.optim.Adam(sae.parameters(), 1e-5)

    def step(x: Tensor) -> None:
        adam.zero_grad()
        loss(x).backward()
        adam.step()

    return step


def sparsify(size: Size, **settings: Any) -> Subject:
    from sparsify import SparseCoder, SparseCoderConfig  # pyright: ignore[reportMissingImports]

    _, d_in, d_sae, k = size
    coder = SparseCoder(d_in, SparseCoderConfig(num_latents=d_sae, k=k, **settings))
    return Subject(coder, optimized(coder, lambda x: coder(x).fvu))


def lens_training(size: Size, name: str, shifted: str | None = None, **settings: Any) -> Subject:
    from sae_lens import saes  # pyright: ignore[reportMissingImports]
    from sae_lens.config import SAETrainerConfig  # pyright: ignore[reportMissingImports]
    from sae_lens.training.sae_trainer import SAETrainer  # pyright: ignore[reportMissingImports]

    tokens, d_in, d_sae, k = size
    settings |= {} if shifted else {"k": k}
    cfg = getattr(saes, f"{name}TrainingSAEConfig")(d_in=d_in, d_sae=d_sae, **settings)
    sae = getattr(saes, f"{name}TrainingSAE")(cfg)
    config = SAETrainerConfig(
        total_training_samples=LONG, train_batch_size_samples=tokens, lr=1e-5, lr_end=0.0
    )
    trainer = SAETrainer(config, sae, iter(()))
    return Subject(sae, trainer.step, trainer.n_forward_passes_since_fired, shifted)


def lens(size: Size, name: str, shifted: str | None = None, **settings: Any) -> Subject:
    """For inference; transcoders, which SAELens has no trainer for, in a training step."""
    from sae_lens import saes  # pyright: ignore[reportMissingImports]

    _, d_in, d_sae, k = size
    settings |= {} if shifted else {"k": k}
    sae = getattr(saes, name)(getattr(saes, f"{name}Config")(d_in=d_in, d_sae=d_sae, **settings))
    if "Transcoder" in name:
        return Subject(sae, optimized(sae, lambda x: (sae(x) - x).square().mean()), None, shifted)
    return Subject(sae, torch.no_grad()(sae), None, shifted)


def dictionary(
    size: Size, module: str, trainer: str, shifted: str | None = None, **settings: Any
) -> Subject:
    from importlib import import_module

    _, d_in, d_sae, k = size
    settings |= {} if shifted else {"k": k}
    settings |= {"activation_dim": d_in, "dict_size": d_sae, "layer": 0, "lm_name": "none"}
    settings |= {"steps": LONG, "device": "cpu", "lr": 1e-5}
    found = getattr(import_module(f"dictionary_learning.trainers.{module}"), trainer)(**settings)
    fired = None if shifted else found.num_tokens_since_fired
    return Subject(found.ae, partial(found.update, 1), fired, shifted)


def transcoder(name: str, shifted: str) -> Callable[[Size], Subject]:
    def make(size: Size) -> Subject:
        return lens(size, name, shifted, d_out=size[1], apply_b_dec_to_input=False)

    return make


def of(make: Callable[..., Subject], *names: Any, **settings: Any) -> Callable[[Size], Subject]:
    return lambda size: make(size, *names, **settings)


def nested(size: Size) -> Subject:
    widths = [size[2] // 16, size[2] // 4, size[2]]
    return lens_training(size, "MatryoshkaBatchTopK", matryoshka_widths=widths)


GROUPS = {"group_fractions": [1 / 16, 3 / 16, 3 / 4]}
SUBJECTS: dict[str, Callable[[Size], Subject]] = {
    "SAELens Standard": of(lens_training, "Standard", "b_enc"),
    "SAELens TopK": of(lens_training, "TopK"),
    "SAELens AbsTopK": of(lens_training, "AbsTopK"),
    "SAELens BatchTopK": of(lens_training, "BatchTopK"),
    "SAELens Matryoshka BatchTopK": nested,
    "SAELens JumpReLU": of(lens_training, "JumpReLU", "threshold"),
    "SAELens Gated": of(lens_training, "Gated", "b_gate"),
    "SAELens Transcoder": transcoder("Transcoder", "b_enc"),
    "SAELens SkipTranscoder": transcoder("SkipTranscoder", "b_enc"),
    "SAELens JumpReLUTranscoder": transcoder("JumpReLUTranscoder", "threshold"),
    "SAELens JumpReLUSkipTranscoder": transcoder("JumpReLUSkipTranscoder", "threshold"),
    "SAELens Standard, inference": of(lens, "StandardSAE", "b_enc"),
    "SAELens TopK, inference": of(lens, "TopKSAE"),
    "SAELens AbsTopK, inference": of(lens, "AbsTopKSAE"),
    "SAELens JumpReLU, inference": of(lens, "JumpReLUSAE", "threshold"),
    "SAELens Gated, inference": of(lens, "GatedSAE", "b_gate"),
    "dictionary_learning AutoEncoder": of(
        dictionary, "standard", "StandardTrainer", "encoder.bias"
    ),
    "dictionary_learning Gated": of(dictionary, "gdm", "GatedSAETrainer", "gate_bias"),
    "dictionary_learning TopK": of(dictionary, "top_k", "TopKTrainer"),
    "dictionary_learning BatchTopK": of(dictionary, "batch_top_k", "BatchTopKTrainer"),
    "dictionary_learning Matryoshka": of(
        dictionary, "matryoshka_batch_top_k", "MatryoshkaBatchTopKTrainer", **GROUPS
    ),
    "dictionary_learning JumpReLU": of(dictionary, "jumprelu", "JumpReluTrainer", "threshold"),
    "sparsify topk": sparsify,
    "sparsify groupmax": of(sparsify, activation="groupmax"),
    "sparsify transcoder": of(sparsify, transcode=True, skip_connection=True),
}
