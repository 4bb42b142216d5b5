"""What processes of a mesh decide together, although it may look different to each."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from fastsae.evals import reconstruction
from fastsae.files import read_json
from fastsae.shards import Shards
from fastsae.train import Callback, Sweep, TrainConfig, Trainer, forecast, trainer
from fastsae.train.state import TrainState
from tests.distributed.test_trainer import config, fit, source_of
from tests.train.conftest import activations as activations


class Evaluation(Callback):
    """Evaluates the SAE in one hook."""

    def __init__(self, hook: str):
        def act(trainer: Trainer, state: TrainState, *_: Any) -> None:
            if hook == "on_step":
                state.sae(torch.zeros(3, 16))
            else:
                reconstruction(trainer.snapshot(state), source_of(trainer.config))

        setattr(self, hook, act)


class Sums(Callback):
    """Exchanges something with all processes, in each several times."""

    def __init__(self, times: int):
        self.times = times

    def on_log(self, trainer: Trainer, state: TrainState, line: Any) -> None:
        for _ in range(self.times):
            trainer.shards.gather_tokens(torch.zeros(1))


def evaluate_alone(shards: Shards, config: TrainConfig) -> list[str]:
    """The errors of runs in which a callback of one process evaluates, and the others do not."""
    found = []
    for n, (hook, rank, every) in enumerate(
        [("on_log", 1, None), ("on_log", 0, 4), ("on_checkpoint", 0, None), ("on_step", 0, None)]
    ):
        if hook == "on_step" and shards.latent == 1:
            continue  # the SAE is whole
        run = replace(config, out=config.out / str(n), eval_every=every)
        callbacks = [Evaluation(hook)] if shards.rank == rank else []
        trainer = Trainer(run, source_of(run), None, callbacks, False, shards)
        with pytest.raises(ValueError) as refusal:
            trainer.fit()
        found.append(f"{hook} {rank}: {refusal.value}")
    run = replace(config, out=config.out / "sums")
    with pytest.raises(ValueError) as refusal:
        Trainer(run, source_of(run), None, [Sums(2 - shards.rank)], False, shards).fit()
    return [*found, f"on_log 0: {refusal.value}"]


@pytest.mark.parametrize("axes", [(2, 1), (1, 2)], ids=str)
def test_what_only_some_processes_call_is_an_error_on_all(processes, activations, tmp_path, axes):
    text = "processes [{}] call in a callback what all must call at once, such as an evaluation"
    for found in processes.run(axes, evaluate_alone, config(activations, tmp_path)):
        assert len(found) == 3 + axes[1]
        for error in found:
            assert text.format(error.split()[1][0]) in error


def evaluate_everywhere(shards: Shards, config: TrainConfig) -> tuple[float, float]:
    """The errors of the SAE that process 0 alone evaluates at the end, and of the whole run."""
    callbacks = [Evaluation("on_log"), Evaluation("on_step")]
    trainer = Trainer(config, source_of(config), None, callbacks, False, shards)
    sae = trainer.fit()
    fvu = 0.0 if shards.rank else reconstruction(sae, source_of(config)).fvu
    return fvu, read_json(config.out / "summary.json")["fvu"]


def test_callbacks_may_evaluate_on_all_processes(processes, activations, tmp_path):
    """And a whole SAE is anyone's once the run is over."""
    run = config(activations, tmp_path)
    (own, fvu), _ = processes.run((2, 1), evaluate_everywhere, run)
    assert own == pytest.approx(fvu, rel=1e-9)


def refuse_for_memory(shards: Shards, config: TrainConfig) -> tuple[str, str, str]:
    """The errors of a run and a sweep for which process 1 alone has too little memory, and of a
    sweep that process 0 cannot begin."""
    left = 1000 if shards.rank == 1 else 1 << 40
    with patch.object(forecast, "memory_left", lambda *_: left):
        with pytest.raises(ValueError) as one:
            fit(shards, config)
        sweep = Sweep({"a": config, "b": config}, source_of(config), config.out, False, shards)
        with pytest.raises(ValueError) as two:
            sweep.fit()
    broken = patch.object(trainer, "check_evaluable", side_effect=OSError("a lost disk"))
    with broken if shards.rank == 0 else nullcontext(), pytest.raises(OSError) as three:
        Sweep({"a": config}, source_of(config), config.out, False, shards, shards.part(1, 2))
    return str(one.value), str(two.value), str(three.value)


def test_what_one_process_lacks_is_an_error_on_all(processes, activations, tmp_path):
    errors = processes.run((1, 2), refuse_for_memory, config(activations, tmp_path / "run"))
    first, second = map(list, errors)
    assert (first.pop(), second.pop()) == ("a lost disk", "process 0: a lost disk")
    for other, own in zip(first, second, strict=True):
        assert "of the 1 kB that this machine" in own and other == f"process 1: {own}"
    assert not (tmp_path / "run").exists()
