"""Trackers get a run's settings, numbers and results, and cannot harm it."""

import json
import logging
import struct
from typing import Any

import pytest

from fastsae.train import RunInfo, Sweep, Trainer
from fastsae.train.interrupt import Interrupted

from .conftest import train_config


class Recorder:
    def __init__(self):
        self.calls = []

    def start(self, run):
        self.calls.append(("start", run))

    def log(self, step, numbers):
        self.calls.append(("log", step, dict(numbers)))

    def end(self, results):
        self.calls.append(("end", results))


@pytest.fixture
def config(activations, tmp_path):
    def make(name="run", **settings):
        given: dict[str, Any] = {"d_sae": 64, "k": 4, "steps": 4, "batch_size": 32, "log_every": 2}
        given |= settings
        return train_config(data=str(activations), out=str(tmp_path / name), device="cpu", **given)

    return make


def fit(config, *loggers, resume=False):
    return Trainer(config, config.data, loggers=loggers, progress=False).fit(resume)


def test_a_logger_gets_settings_lines_and_results(config):
    run, recorder = config(), Recorder()
    fit(run, recorder)
    (_, info), *lines, (_, results) = recorder.calls
    assert isinstance(info, RunInfo) and info.step == 0
    assert (info.settings["d_sae"], info.flat["activation.k"]) == (64, 4)
    assert info.settings["environment"]["torch"]
    assert [step for _, step, _ in lines] == [2, 4] and all("fvu" in n for *_, n in lines)
    assert results == json.loads((run.out / "summary.json").read_text())


class Failing(Recorder):
    def log(self, step, numbers):
        super().log(step, numbers)
        raise ConnectionError("no route to the tracker")


def test_a_logger_that_fails_leaves_the_run_alone(config, caplog):
    failing, other = Failing(), Recorder()
    fit(config("failing"), failing, other)
    fit(config("alone"))
    names = [kind for kind, *_ in failing.calls]
    assert names == ["start", "log"] and len(other.calls) == 4
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "no route to the tracker" in warning
    saes = [
        (config(name).out / "sae/sae.safetensors").read_bytes() for name in ("failing", "alone")
    ]
    assert saes[0] == saes[1]


def test_a_run_does_not_start_without_its_logger(config):
    class Absent(Recorder):
        def start(self, run):
            raise RuntimeError("not logged in")

    run, other = config(), Recorder()
    with pytest.raises(ValueError, match="Absent did not start: not logged in"):
        fit(run, other, Absent())
    assert not (run.out / "metrics.jsonl").exists()
    assert [kind for kind, *_ in other.calls] == ["start", "end"]
    fit(run, other, resume=True)
    assert other.calls[-1][1] is not None


def test_an_interrupted_run_ends_without_results_and_resumes(config, monkeypatch):
    run, recorder = config(), Recorder()
    trainer = Trainer(run, run.data, loggers=[recorder], progress=False)

    def interrupt(state):
        raise Interrupted(2, "stopped")

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "finish", interrupt)
        with pytest.raises(Interrupted):
            trainer.fit()
    assert recorder.calls[-1] == ("end", None)
    Trainer(run, run.data, loggers=[recorder], progress=False).fit(resume=True)
    *_, (_, info), (_, results) = recorder.calls
    assert info.step == 4 and results is not None


def test_tensorboard(config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = config(tensorboard=True)
    fit(run)
    found = EventAccumulator(str(run.out / "tensorboard"))
    found.Reload()
    summary = json.loads((run.out / "summary.json").read_text())
    assert [event.step for event in found.Scalars("fvu")] == [2, 4]
    assert found.Scalars("final/fvu")[0].value == pytest.approx(summary["fvu"], rel=1e-6)
    assert b"d_sae" in found.Tensors("settings/text_summary")[0].tensor_proto.string_val[0]
    session = found.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    assert b"d_sae" in session and b"environment.torch" in session


BLOCK, HEADER = 32768, 7


def records(out):
    """What the file of the offline run in a directory holds: a log in the format of LevelDB, whose
    records are cut where blocks end."""
    from wandb.proto import wandb_internal_pb2

    kinds: Any = wandb_internal_pb2
    (path,) = out.glob("wandb/offline-run-*/*.wandb")
    data, place, whole = path.read_bytes(), HEADER, b""
    while place + HEADER <= len(data):
        left = -place % BLOCK
        if 0 < left < HEADER:
            place += left
        length, kind = struct.unpack_from("<HB", data, place + 4)
        place += HEADER + length
        whole += data[place - length : place]
        if kind in (1, 4):  # all of a record, or its last part
            yield kinds.Record.FromString(whole)
            whole = b""


def settings_in(found):
    return {u.key: json.loads(u.value_json) for r in found for u in r.run.config.update}


def test_wandb_offline(config, monkeypatch, tmp_path):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    given = {"wandb": "fastsae-test", "wandb_artifacts": True}
    configs = {f"k{k}": config(k=k, **given) for k in (2, 4)}
    Sweep(configs, configs["k2"].data, tmp_path / "sweep", progress=False).fit()
    wandb.teardown()  # its service writes the last records
    for k in (2, 4):
        found = [*records(tmp_path / "sweep" / f"k{k}")]
        settings = settings_in(found)
        assert (settings["d_sae"], settings["seed"], settings["activation"]["k"]) == (64, 0, k)
        assert settings["environment"]["commit"]
        final = {u.key: u.value_json for r in found for u in r.summary.update}
        summary = json.loads((tmp_path / "sweep" / f"k{k}" / "summary.json").read_text())
        assert json.loads(final["final/fvu"]) == summary["fvu"]
        assert "model" in [r.artifact.type for r in found]
