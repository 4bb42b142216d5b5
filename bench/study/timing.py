"""How long each method's training takes: steps of trained SAEs, in turns."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from bench.clock import interleaved, summary
from fastsae.data import ActivationSource
from fastsae.train import Trainer, stored_config
from fastsae.train.run_folder import latest


def seconds_per_million(
    runs: dict[str, Path], source: ActivationSource, rounds: int
) -> dict[str, dict[str, float]]:
    """Median, least and most seconds per million tokens, by method, from the folders of runs.

    A step is one on the same batch from the last checkpoint, with the dead latents of then and a
    learning rate of 0, so that L0 stays that of the result; loading data is not part of it.
    """
    with tempfile.TemporaryDirectory() as folder:
        steps = {
            method: step_of(run, source, Path(folder) / str(number))
            for number, (method, run) in enumerate(runs.items())
        }
        times = interleaved(steps, rounds)
    tokens = {method: stored_config(run).batch_size for method, run in runs.items()}
    return {m: summary([1e3 * t / tokens[m] for t in found]) for m, found in times.items()}


def step_of(run: Path, source: ActivationSource, out: Path) -> Callable[[], object]:
    """A training step of the SAE in a run's folder, as that run took it."""
    out.mkdir()
    trainer = Trainer(replace(stored_config(run), out=out), source)
    state = trainer.start(resume=False, checkpoint=latest(run))
    with trainer.batches(state) as batches:
        batch = trainer.load(batches, state)
    return lambda: trainer.step(state, batch, None)
