"""Measures a few steps of a run on planted activations."""

import statistics
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from fastsae.data import Joined, Synthetic, as_source

from .callbacks import Callback
from .config import TrainConfig
from .state import TrainState
from .trainer import Trainer

PROBED_STEPS, FIRST = 20, 4
"""Steps that are run, and how many of them do not count: they allocate memory and compile."""

BATCHES = 4
"""Batches of planted activations."""

NEVER = 1 << 40
"""Tokens after which a latent counts as dead, and steps between checkpoints: more than there
are."""


class Stopwatch(Callback):
    """Seconds of each step, with the time to wait for its data."""

    def __init__(self):
        self.seconds: list[float] = []
        self.last = 0.0

    def on_step(self, trainer: Trainer, state: TrainState) -> None:
        """On a GPU, whose steps return before they are done, this waits for them."""
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)
        now = time.perf_counter()
        if state.step > FIRST:
            self.seconds.append(now - self.last)
        self.last = now


def planted(tokens: int, width: int) -> Tensor:
    """Sums of directions, of which some are frequent, as an SAE learns them: [N, D]. Of noise it
    learns none, and its steps would take another time."""
    rows = Synthetic(
        d_in=width,
        n_latents=4 * width,
        active=min(8, width),
        n_tokens=tokens,
        noise=0.02,
        frequency_exponent=1.0,
    )
    return rows.sample(tokens)


def probe(config: TrainConfig, d_in: int, d_out: int) -> float:
    """Seconds of a step of the run, on planted activations of these widths: the median of
    PROBED_STEPS real steps of a Trainer."""
    tokens = BATCHES * config.batch_size
    widths = (d_in, *(d_in for _ in config.layers))
    if config.target is not None:
        widths = d_in, d_out
    parts = [as_source(planted(tokens, width)) for width in widths]
    source = Joined(*parts) if len(parts) > 1 else parts[0]  # pyright: ignore[reportArgumentType]
    watch = Stopwatch()
    with TemporaryDirectory() as folder:
        short = replace(
            config,
            out=Path(folder) / "probe",
            data=None,
            stream=None,
            downstream="none",
            steps=PROBED_STEPS,
            dead_after=NEVER,
            checkpoint_every=NEVER,
            eval_every=None,
            patience=None,
            tensorboard=False,
            wandb=None,
        )
        Trainer(short, source, callbacks=[watch], progress=False).fit()
    return statistics.median(watch.seconds)
