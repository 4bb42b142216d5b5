"""What runs besides training changes no bit of it, and can end it early."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastsae
from fastsae.checkpoint import load_checkpoint
from fastsae.data import ActivationShards, ShardWriter, Synthetic
from fastsae.evals import reconstruction
from fastsae.files import read_json
from fastsae.train import Callback, EarlyStopping, StopTraining, Sweep, Trainer
from fastsae.train.callbacks import HELDOUT_TOKENS
from fastsae.train.curves import PANELS, plot_curves
from fastsae.train.log import plain_numbers, read_lines

from .conftest import Stop, StoppingShards, train_config

pytestmark = pytest.mark.usefixtures("undrawn")
TIMES = ("seconds", "tokens_per_second")
LAZY = {"adam_moments": "bf16", "adam_window": 4, "adam_second": "row"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Activations with a held-out part, a few of them of extreme norm."""
    folder = tmp_path_factory.mktemp("data")
    source = Synthetic(d_in=16, n_latents=40, active=3, n_tokens=3000, noise=0.01, seed=1)
    assert source.heldout is not None
    x, heldout = (1 + part.rows(torch.arange(3000)) for part in (source, source.heldout))
    heldout[::500] *= 1000
    np.save(folder / "x.npy", x.numpy())
    writer = ShardWriter(folder / "heldout", 16)
    writer.append(heldout, *torch.zeros(3, 3000, dtype=torch.int32))
    writer.finish()
    return folder


@pytest.fixture
def config(data, tmp_path):
    def build(name="run", **settings):
        small = {"d_sae": 64, "k": 4, "batch_size": 200, "steps": 14, "checkpoint_every": 4}
        where = {"data": str(data), "out": str(tmp_path / name)}
        return train_config(**{**where, **small, **settings})

    return build


def lines_of(run) -> list[dict[str, Any]]:
    lines = read_lines(run.out / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def weights(run) -> bytes:
    return (run.out / "sae" / "sae.safetensors").read_bytes()


@pytest.mark.parametrize(
    "options",
    [LAZY, {"ema": 0.9}, {"encoder_precision": "int8"}, {"activation": "batchtopk"}],
    ids=str,
)
def test_evaluating_changes_no_bit_and_evaluates_what_would_be_saved(
    options, config, data, monkeypatch
):
    """Also where the run stops and resumes. The last step's evaluation is that of the saved SAE."""
    monkeypatch.setattr("fastsae_kernels.int8.why_not_int8", lambda device: "emulated")
    monkeypatch.setattr("fastsae.train.plan.why_not_int8", lambda device: None)
    plain, whole = config("plain", **options), config("whole", **options, eval_every=7)
    for run in (plain, whole):
        Trainer(run, ActivationShards(data)).fit()
    broken = config("broken", **options, eval_every=7)
    with pytest.raises(Stop):
        Trainer(broken, StoppingShards(data, 9)).fit()
    Trainer(broken, ActivationShards(data)).fit(resume=True)
    assert weights(plain) == weights(whole) == weights(broken)
    last = Path("checkpoints", "step-00000014")
    (one, _), (two, _) = (load_checkpoint(run.out / last) for run in (plain, whole))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    lines = lines_of(whole)
    assert lines == lines_of(broken)
    assert [line["step"] for line in lines if "heldout_fvu" in line] == [7, 14]
    heldout = ActivationShards(data).heldout
    assert heldout is not None and heldout.n_tokens < HELDOUT_TOKENS
    found = reconstruction(fastsae.load(whole.out), heldout, pc_ranks=())
    for name in ("fvu", "l0", "dead_fraction"):
        assert lines[-1][f"heldout_{name}"] == getattr(found, name)


def test_the_saes_of_a_sweep_are_evaluated_too(config, data, tmp_path, monkeypatch):
    """Their encoders are in one matrix."""
    monkeypatch.setattr("fastsae.train.comparison._plot", lambda *arguments: None)
    source, saes = ActivationShards(data), {}
    for every in (None, 7):
        configs = {f"k{k}": config(k=k, eval_every=every) for k in (2, 4)}
        saes[every] = Sweep(configs, source, tmp_path / str(every), progress=False).fit()
    for name, sae in saes[None].items():
        assert torch.equal(sae.W_enc, saes[7][name].W_enc)
        (*_, last) = read_lines(tmp_path / "7" / name / "metrics.jsonl")
        heldout = source.heldout or source
        assert last["heldout_fvu"] == reconstruction(sae, heldout, pc_ranks=()).fvu


def test_an_sae_of_a_sweep_may_end_before_the_others(config, data, tmp_path, monkeypatch, capsys):
    """Its batches go to the other alone. Resumed before or after that, no bit is another."""
    monkeypatch.setattr("fastsae.train.comparison._plot", lambda *arguments: None)
    every = {"eval_every": 2, "checkpoint_every": 4, "steps": 10}
    saes = {"stuck": {"patience": 1, "lr": 1e-30}, "k2": {"k": 2}}
    configs = {name: config(**every, **own) for name, own in saes.items()}

    def fit(out: Path, source: ActivationShards, resume: bool = False) -> None:
        Sweep(configs, source, tmp_path / out).fit(resume)

    fit(Path("whole"), ActivationShards(data))
    assert "stuck: ended early at step" in capsys.readouterr().err
    # left, damaged checkpoint of the one that ends, steps from which they continue
    stops = [(2, "", [0, 0]), (9, "", [6, 8]), (9, "4", [6, 8]), (9, "6", [4, 4])]
    for left, damage, steps in stops:
        out = Path(f"stopped at {left}, damaged {damage}")
        with pytest.raises(Stop):
            fit(out, StoppingShards(data, left))
        for file in (tmp_path / out / "stuck" / "checkpoints").glob(f"*{damage or 'none'}/*.s*"):
            file.write_bytes(b"damaged")
        begun = Sweep(configs, ActivationShards(data), tmp_path / out).start(resume=True)
        assert [state.step for state in begun.values()] == steps
        fit(out, ActivationShards(data), resume=True)
        for name, own in configs.items():
            one, two = (replace(own, out=tmp_path / o / name) for o in (Path("whole"), out))
            assert weights(one) == weights(two) and lines_of(one) == lines_of(two)
    stuck, other = (read_json(tmp_path / "whole" / name / "summary.json") for name in configs)
    assert "ended_early" in stuck and stuck["tokens"] == 6 * 200
    assert "ended_early" not in other and other["tokens"] == 2000
    configs = {name: configs["stuck"] for name in "ab"}
    fit(Path("both"), StoppingShards(data, 6))  # once all have ended, it takes no batches


class Recorder(Callback):
    """Notes every call, adds a number to lines, and ends the run in one of the hooks."""

    def __init__(self, hook="", step=0):
        self.calls: list[tuple[str, int]] = []
        self.ending = hook, step

    def note(self, *call):
        self.calls.append(call)
        if call == self.ending:
            raise StopTraining("that will do")

    def on_step(self, trainer, state):
        self.note("step", state.step)

    def on_log(self, trainer, state, line):
        line["threshold"] = state.step / 2
        self.note("log", state.step)

    def on_checkpoint(self, trainer, state):
        self.note("checkpoint", state.step)

    def on_end(self, trainer, sae):
        assert (trainer.config.out / "summary.json").exists() and not sae.training
        self.note("end", len(self.calls))


def test_hooks_are_called_in_order(config, data):
    run, recorder = config(log_every=3, steps=5, checkpoint_every=4), Recorder()
    Trainer(run, ActivationShards(data), callbacks=[recorder]).fit()
    steps = ["step 1", "step 2", "step 3", "log 3", "step 4", "checkpoint 4"]
    last = ["step 5", "log 5", "checkpoint 5", "end 9"]
    assert [f"{name} {step}" for name, step in recorder.calls] == steps + last
    assert [line["threshold"] for line in lines_of(run)] == [1.5, 2.5]


def test_time_waited_for_the_device_counts(config, data):
    """A GPU is waited for where losses are read."""

    class Waiting(Trainer):
        waited = 0.0

        def check_finite(self, state, batch):
            start = time.perf_counter()
            time.sleep(0.05)
            super().check_finite(state, batch)
            self.waited += time.perf_counter() - start

    class Waited(Callback):
        def on_log(self, trainer, state, line):
            assert isinstance(trainer, Waiting)
            line["waited"] = trainer.waited

    run = config(log_every=2, steps=8, checkpoint_every=3)
    Waiting(run, ActivationShards(data), callbacks=[Waited()]).fit()
    lines = read_lines(run.out / "metrics.jsonl")
    assert len(lines) == 4 and all(line["seconds"] >= line["waited"] for line in lines)


@pytest.mark.parametrize("hook", ["step", "log"])
def test_a_callback_ends_the_run_as_if_that_step_was_its_last(hook, config, data, capsys):
    run, other = config(log_every=1), Recorder()
    Trainer(run, ActivationShards(data), callbacks=[Recorder(hook, 6), other]).fit()
    assert "ended early at step 6 of 14: that will do" in capsys.readouterr().err
    assert [name for name, _ in other.calls[-4:]] == ["step", "log", "checkpoint", "end"]
    assert [line["step"] for line in lines_of(run)] == [1, 2, 3, 4, 5, 6]
    summary = json.loads((run.out / "summary.json").read_text())
    assert (summary["ended_early"], summary["tokens"]) == ("that will do", 6 * 200)
    saved = weights(run)
    Trainer(run, ActivationShards(data)).fit(resume=True)
    assert weights(run) == saved and len(lines_of(run)) == 6, "it has ended"
    longer = config(log_every=1, steps=8)
    Trainer(longer, ActivationShards(data)).fit(resume=True)
    assert len(lines_of(run)) == 8
    assert "ended_early" not in json.loads((run.out / "summary.json").read_text())


def test_numbers_of_numpy_and_torch_are_logged_and_others_refused(config, data):
    class Adding(Callback):
        def on_log(self, trainer, state, line):
            line |= {"numpy": np.float32(0.5), "torch": torch.tensor(0.25), "text": "added"}

    run = config(steps=1)
    Trainer(run, ActivationShards(data), callbacks=[Adding()]).fit()
    (line,) = lines_of(run)
    assert (line["numpy"], line["torch"], line["text"]) == (0.5, 0.25, "added")
    for value in torch.ones(2), float("nan"), [1.0], np.float64("inf"):
        with pytest.raises(ValueError, match="finite numbers or text, got added = "):
            plain_numbers({"step": 1, "added": value})


def test_other_exceptions_propagate(config, data):
    class Failing(Callback):
        def on_step(self, trainer, state):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Trainer(config(), ActivationShards(data), callbacks=[Failing()]).fit()


@pytest.mark.parametrize("stop", [None, 5, 7])
def test_early_stopping_counts_evaluations_also_of_before_a_stop(stop, config, data):
    """Here only the first one improves by as much as is asked for."""
    run, patient = config(eval_every=2, checkpoint_every=3), EarlyStopping(3, min_delta=1e9)
    if stop is not None:
        with pytest.raises(Stop):
            Trainer(run, StoppingShards(data, stop), callbacks=[patient]).fit()
    Trainer(run, ActivationShards(data), callbacks=[patient]).fit(resume=stop is not None)
    assert [line["step"] for line in lines_of(run)] == [2, 4, 6, 8]
    assert "in the last 3 evaluations" in (run.out / "summary.json").read_text()


def test_a_run_of_patience_trains_while_its_error_falls(config, data):
    falling = config(eval_every=2, patience=1, lr=3e-3, decay=0.0)
    Trainer(falling, ActivationShards(data)).fit()
    assert lines_of(falling)[-1]["step"] == 14
    stuck = config("stuck", eval_every=2, patience=2, lr=1e-30)
    Trainer(stuck, ActivationShards(data)).fit()
    *before, one, two = (line["heldout_fvu"] for line in lines_of(stuck))
    assert len(before) < 5 and min(one, two) >= min(before)


def test_what_evaluations_need(config, data):
    plain = ActivationShards(data / "x.npy")
    with pytest.raises(ValueError, match="eval_every = 5 needs held-out data, and there is none"):
        Trainer(config(eval_every=5), plain)
    with pytest.raises(ValueError, match="early stopping needs eval_every, got None"):
        Trainer(config(), plain, callbacks=[EarlyStopping(1)])
    with pytest.raises(ValueError, match="patience must be at least 1, got 0"):
        EarlyStopping(0)
    with pytest.raises(ValueError, match="min_delta must be at least 0 and finite, got -1"):
        EarlyStopping(1, -1.0)


def test_held_out_numbers_are_drawn(tmp_path):
    lines = [{"step": step, **dict.fromkeys(PANELS, 0.5)} for step in (1, 2, 3)]
    plot_curves(lines, tmp_path / "without.png", "title")
    plot_curves([*lines[:2], lines[2] | {"heldout_l0": 0.25}], tmp_path / "with.png", "title")
    assert (tmp_path / "with.png").read_bytes() != (tmp_path / "without.png").read_bytes()
