"""Whole runs on meshes: the folder that they leave, and how they stop and go on."""

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastsae
from fastsae.checkpoint import list_checkpoints
from fastsae.data.ordinary import SAMPLE_TOKENS
from fastsae.files import read_json
from fastsae.shards import ONE_PROCESS, Shards
from fastsae.train import Callback, Interrupted, StopTraining, TrainConfig, Trainer
from fastsae.train.state import TrainState
from tests.distributed.rounding import (
    assert_rounding,
    assert_same_run,
    columns,
    default_dtype,
    results,
)
from tests.train.conftest import activations as activations
from tests.train.conftest import train_config

SETTINGS: dict[str, Any] = {
    "d_sae": 48, "k": 4, "steps": 12, "batch_size": 64, "checkpoint_every": 4, "log_every": 4,
    "dead_after": 128,
}  # fmt: skip


def config(data: Path | None, out: Path, **settings: Any) -> TrainConfig:
    merged = SETTINGS | settings
    if merged.get("activation", "topk") not in ("topk", "abstopk", "batchtopk"):
        del merged["k"]
    return train_config(data=data and str(data), out=str(out), **merged)


def source_of(config: TrainConfig) -> fastsae.ActivationShards:
    source = fastsae.ActivationShards(str(config.data))
    source.heldout = fastsae.ActivationShards(str(config.data))
    return source


def fit(
    shards: Shards, config: TrainConfig, resume: bool = False, dtype: torch.dtype = torch.float32
) -> None:
    with default_dtype(dtype):
        Trainer(config, source_of(config), progress=False, shards=shards).fit(resume)


RUNS: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {
    "topk": ((2, 2), {"eval_every": 4}),
    "a window": ((1, 4), {"adam_window": 4, "activation": "abstopk"}),
    "batchtopk": ((2, 2), {"activation": "batchtopk", "encoder": "fitted"}),
    "jumprelu": ((1, 2), {"activation": "jumprelu", "target_l0": 4.0, "bandwidth": 0.5}),
    "gated": ((1, 4), {"activation": "gated", "target_l0": 4.0, "ema": 0.9}),
    "relu": ((1, 2), {"activation": "relu", "l1_coef": 0.1, "clip": 0.1, "adam_second": "row"}),
    "matryoshka": ((1, 4), {"prefixes": [8, 30]}),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_a_mesh_is_that_of_one_process(processes, activations, tmp_path, name):
    axes, settings = RUNS[name]
    exact, rough, many = (tmp_path / name for name in ("exact", "rough", "many"))
    fit(ONE_PROCESS, config(activations, exact, **settings), False, torch.float64)
    fit(ONE_PROCESS, config(activations, rough, **settings))
    processes.run(axes, fit, config(activations, many, **settings), False, torch.float64)
    if name == "topk":
        _, lines = results(exact)
        assert any(line["dead_fraction"] for line in lines), "the aux loss takes part"
    assert_same_run(many, exact, rough)
    summaries = [read_json(out / "summary.json") for out in (many, exact, rough)]
    assert_rounding(*(columns([{"fvu": summary["fvu"]}]) for summary in summaries))
    assert {path.name for path in many.iterdir()} >= {"config.json", "summary.json", "checkpoints"}


class Stopped(Exception):
    pass


def fit_to(shards: Shards, config: TrainConfig, last: int, dtype: torch.dtype) -> None:
    """As `fit`, but the run breaks off after a step, as if all processes had been killed."""

    class Breaking(Callback):
        def on_step(self, trainer: Trainer, state: TrainState) -> None:
            if state.step == last:
                raise Stopped

    with pytest.raises(Stopped), default_dtype(dtype):
        Trainer(config, source_of(config), None, [Breaking()], False, shards).fit()


@pytest.fixture(scope="module")
def references(activations, tmp_path_factory) -> tuple[Path, Path]:
    """A run of one process in float64 and in float32."""
    exact, rough = (tmp_path_factory.mktemp("runs") / name for name in ("exact", "rough"))
    fit(ONE_PROCESS, config(activations, exact, batch_size=72), False, torch.float64)
    fit(ONE_PROCESS, config(activations, rough, batch_size=72))
    return exact, rough


@pytest.mark.parametrize(
    "first, then", [((1, 4), (2, 2)), ((2, 2), (1, 1)), ((1, 1), (1, 3)), ((1, 2), (2, 1))], ids=str
)
def test_any_mesh_resumes_the_run_of_another(
    processes, references, activations, tmp_path, first, then
):
    many = config(activations, tmp_path, batch_size=72)
    processes.run(first, fit_to, many, 10, torch.float64)
    processes.run(then, fit, many, True, torch.float64)
    assert_same_run(tmp_path, *references)


def test_a_mesh_resumes_bit_for_bit_on_any_data_axis(processes, activations, tmp_path):
    settings = {"adam_moments": "bf16"}
    whole, halves = (config(activations, tmp_path / n, **settings) for n in ("whole", "halves"))
    processes.run((2, 2), fit, whole)
    processes.run((2, 2), fit_to, halves, 10, torch.float32)
    processes.run((1, 2), fit, halves, True)
    assert results(whole.out)[1] == results(halves.out)[1]
    files = [(c.out / "sae" / "sae.safetensors").read_bytes() for c in (whole, halves)]
    assert files[0] == files[1]


def stop_one(shards: Shards, config: TrainConfig) -> tuple[int, str]:
    """Train until SIGTERM comes to the last process alone, after its fifth step."""

    class Signal(Callback):
        def on_step(self, trainer: Trainer, state: TrainState) -> None:
            if state.step == 5 and shards.rank == shards.size - 1:
                os.kill(os.getpid(), signal.SIGTERM)

    try:
        Trainer(config, source_of(config), None, [Signal()], False, shards).fit()
    except Interrupted as stop:
        return stop.signum, str(stop)
    raise AssertionError("the run was to stop")


def test_a_signal_to_one_process_stops_all_at_the_same_step(processes, activations, tmp_path):
    run = config(activations, tmp_path / "run", batch_size=66)
    found = processes.run((1, 3), stop_one, run)
    assert [*map(str, list_checkpoints(run.out / "checkpoints"))][-1].endswith("step-00000005")
    assert {signum for signum, _ in found} == {signal.SIGTERM}
    assert len({text for _, text in found}) == 1 and "stopped at step 5 of 12" in found[0][1]


def fails(shards: Shards, config: TrainConfig) -> str:
    """The error of a run whose data have a NaN, which one process reads."""
    try:
        fit(shards, config)
    except ValueError as error:
        return str(error)
    raise AssertionError("the run was to fail")


def test_a_nan_that_one_process_reads_ends_all_by_its_name(processes, tmp_path):
    x = np.random.default_rng(0).standard_normal((20_000, 16), dtype=np.float32)
    sample = np.random.Generator(np.random.PCG64(0)).choice(len(x), SAMPLE_TOKENS, replace=False)
    row = min({*range(len(x))} - {*sample.tolist()})
    x[row, 5] = np.nan
    np.save(tmp_path / "nan.npy", x)
    run = config(tmp_path / "nan.npy", tmp_path / "run", batch_size=2000)
    texts = processes.run((1, 4), fails, run)
    own = [text for text in texts if text.startswith("step ")]
    assert len(own) == 1 and f"nan.npy row {row}" in own[0]
    (rank,) = [rank for rank, text in enumerate(texts) if text == own[0]]
    others = {text for text in texts if text != own[0]}
    assert others == {f"process {rank}: {own[0]}"}


def stopped_at(shards: Shards, config: TrainConfig) -> int:
    """Where a run ends that a callback of the last process ends after its fifth step."""
    steps = []

    class Ending(Callback):
        def on_step(self, trainer: Trainer, state: TrainState) -> None:
            steps.append(state.step)
            if state.step == 5 and shards.rank == shards.size - 1:
                raise StopTraining("enough")

    Trainer(config, source_of(config), None, [Ending()], False, shards).fit()
    return steps[-1]


def test_a_callback_of_one_process_ends_the_run_of_all(processes, activations, tmp_path):
    run = config(activations, tmp_path / "run")
    assert processes.run((2, 2), stopped_at, run) == [5] * 4
    assert read_json(run.out / "summary.json")["ended_early"] == "enough"


def test_patience_is_that_of_process_0(processes, activations, tmp_path):
    lasting = {"patience": 1, "eval_every": 2, "lr": 1.0, "steps": 60}
    one, many = (config(activations, tmp_path / name, **lasting) for name in ("one", "many"))
    fit(ONE_PROCESS, one)
    processes.run((1, 4), fit, many)
    (_, lines), (_, found) = results(one.out), results(many.out)
    assert len(lines) < 15 and [line["step"] for line in lines] == [line["step"] for line in found]


def other_data(shards: Shards, config: TrainConfig) -> str:
    x = np.random.default_rng(shards.rank).standard_normal((500, 16), dtype=np.float32)
    with pytest.raises(ValueError) as refusal:
        Trainer(config, x, progress=False, shards=shards).fit()
    return str(refusal.value)


def test_processes_with_other_data_are_refused_at_once(processes, tmp_path):
    run = config(None, tmp_path / "run")
    for text in processes.run((1, 2), other_data, run):
        assert "differ in data, the activations of a sample" in text
    assert not (tmp_path / "run").exists()


def refuse(shards: Shards, config: TrainConfig) -> str:
    with pytest.raises(ValueError) as refusal:
        Trainer(config, source_of(config), shards=shards)
    return str(refusal.value)


@pytest.mark.parametrize(
    "axes, settings, text",
    [
        ((1, 4), {"d_sae": 50}, "d_sae must be divisible by latent=4, got 50"),
        ((2, 2), {"batch_size": 66}, "batch_size must be divisible by the number of processes, 4"),
        ((1, 2), {"activation": "variational"}, 'activation "variational" needs a mesh with'),
        ((1, 2), {"gradient": "rotation"}, 'gradient "rotation" needs a mesh with latent=1'),
        ((2, 1), {"prefixes": [8, 24]}, "prefixes or multi_k needs a mesh with data=1"),
        (
            (1, 4),
            {"adam_window": 5},
            "with adam_window = 5, each process must have a multiple of 5",
        ),
    ],
    ids=str,
)
def test_what_a_mesh_cannot_do_is_refused_before_anything_is_written(
    processes, activations, tmp_path, axes, settings, text
):
    texts = processes.run(axes, refuse, config(activations, tmp_path / "run", **settings))
    assert all(text in found for found in texts)
    assert not (tmp_path / "run").exists()
