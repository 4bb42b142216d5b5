"""A run says what it will need, refuses what cannot fit, and records plan and fact."""

import math
import mmap
import sys
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from fastsae.distributed.launch import Place
from fastsae.train import Sweep, Trainer
from fastsae.train.facts import MemoryMeter
from fastsae.train.forecast import (
    check_fits,
    describe_forecast,
    this_machine,
    timed,
)
from fastsae.train.run_table import run_table
from fastsae.train.summary import Summary, read_results
from tests.train.conftest import train_config

pytestmark = pytest.mark.usefixtures("undrawn")
SHAPE: dict[str, Any] = dict(d_sae=256, k=4, batch_size=64, steps=20, device="cpu")


def test_the_summary_holds_plan_and_fact(activations, tmp_path):
    config = train_config(out=str(tmp_path / "run"), **SHAPE)
    trainer = Trainer(config, activations, progress=False)
    trainer.forecast = timed(trainer.forecast)
    trainer.fit()
    facts = read_results(Summary, config.out / "summary.json").get("facts", {})
    assert facts.keys() >= {"planned_step_seconds", "step_seconds", "planned_peak_bytes"}
    assert facts.get("planned_step_seconds") == trainer.forecast.step_seconds
    assert "  planned  " in run_table(config.out) and " ms per step, took " in run_table(config.out)
    assert " ms per step, " in describe_forecast(trainer.forecast)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_memory_that_was_returned_between_phases_counts():
    size = 64 << 20
    with MemoryMeter(torch.device("cpu")) as meter:
        with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
            block.write(b"1" * size)
            end = time.monotonic() + 10
            while meter.most - (meter.before or 0) < size and time.monotonic() < end:
                time.sleep(0.01)
        assert size <= (meter.read() or 0) < 4 * size


def test_a_run_without_room_leaves_nothing(activations, tmp_path, monkeypatch):
    large: dict[str, Any] = {**SHAPE, "d_sae": 1 << 18}
    config = train_config(out=str(tmp_path / "run"), **large)
    memory = Trainer(config, activations, progress=False).forecast.memory
    monkeypatch.setattr("fastsae.memory.available_memory", lambda: memory.kept)
    with pytest.raises(ValueError, match=r"does not fit: .* what would fit: --d-sae \d+ "):
        Trainer(config, activations, progress=False).fit()
    assert not config.out.exists()
    room = memory.certain
    monkeypatch.setattr("fastsae.memory.available_memory", lambda: room)
    close = Trainer(config, activations, progress=False).forecast
    check_fits([close])  # no estimate refuses a run
    assert not close.fits and "it may run out" in describe_forecast(close)


def test_the_saes_of_a_sweep_need_memory_together(activations, tmp_path, monkeypatch):
    config = train_config(out=str(tmp_path), **SHAPE)
    configs = {name: config for name in "abc"}
    need = Trainer(config, activations, progress=False).forecast.memory
    room = 2 * need.kept + need.certain - 1
    monkeypatch.setattr("fastsae.memory.available_memory", lambda: room)
    with pytest.raises(ValueError, match="does not fit"):
        Sweep(configs, activations, tmp_path / "three", progress=False).fit()
    assert not (tmp_path / "three").exists()


def test_no_time_is_planned_where_it_is_not_known(activations, tmp_path):
    config = train_config(out=str(tmp_path / "run"), step="autograd", **SHAPE)
    trainer = Trainer(config, activations, progress=False)
    assert timed(trainer.forecast).seconds is None
    assert "is a lower bound" in describe_forecast(trainer.forecast)
    streamed = replace(trainer.forecast.workload, streamed=True, fused=True)
    assert timed(replace(trainer.forecast, workload=streamed)).seconds is None


def test_the_time_of_a_model_is_not_planned(activations, tmp_path):
    config = train_config(out=str(tmp_path / "run"), **SHAPE)
    trainer = Trainer(config, activations, progress=False)
    workload = replace(trainer.forecast.workload, streamed=True)
    found = replace(trainer.forecast, seconds={"step": 0.5}, how="predicted", workload=workload)
    assert "10 seconds (predicted, without the model)" in describe_forecast(found)
    trainer.forecast = found
    trainer.fit()
    facts = read_results(Summary, config.out / "summary.json").get("facts", {})
    assert "step_seconds" in facts and "planned_step_seconds" not in facts


def test_processes_share_the_memory_of_their_machine(activations, tmp_path, monkeypatch):
    monkeypatch.setattr("fastsae.memory.available_memory", lambda: 1000)
    monkeypatch.setattr("fastsae.train.forecast.place", lambda: Place(0, 4, 0, 4))
    trainer = Trainer(train_config(out=str(tmp_path), **SHAPE), activations, progress=False)
    assert trainer.forecast.machine.memory == 250
    monkeypatch.setattr("fastsae.memory.available_memory", lambda: sys.maxsize)
    assert this_machine("cpu", 3).memory == math.inf
