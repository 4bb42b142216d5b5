"""Runs that are resumed with another number of steps, and runs that start from a trained SAE."""

import json

import numpy as np
import pytest
import torch

from fastsae import SAE
from fastsae.cli.train import main, read_train
from fastsae.data import ActivationShards
from fastsae.files import read_tensors
from fastsae.interop import load, save
from fastsae.nn.relu import ReLU, ReLUConfig
from fastsae.train import Trainer
from fastsae.train.log import read_lines
from fastsae.train.optim import schedule

from .conftest import Stop, StoppingShards, train_config

pytestmark = pytest.mark.usefixtures("undrawn")
SMALL = {"d_sae": 64, "k": 4, "batch_size": 200, "lr": 3e-3, "log_every": 1, "device": "cpu"}
CONSTANT = {"warmup": 0, "decay": 0.0, "dead_after": 400}  # nothing is planned from the steps


@pytest.fixture
def run(tmp_path, activations):
    """Train in a folder of that name, on data that break off after some batches."""

    def fit(name, steps, resume=False, left=-1, **settings):
        out = str(tmp_path / name)
        all_settings = {"data": str(activations), "out": out, "steps": steps, **SMALL, **settings}
        source = StoppingShards(activations, left)
        return Trainer(train_config(**all_settings), source).fit(resume)

    return fit


def test_a_longer_run_is_the_one_that_was_long_from_the_start(run, tmp_path):
    run("whole", 20, **CONSTANT)
    run("parts", 8, **CONSTANT)
    run("parts", 20, resume=True, **CONSTANT)
    whole, parts = (read_tensors(tmp_path / n / "sae/sae.safetensors") for n in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_longer_run_has_the_schedule_of_its_length_and_can_be_resumed(run, tmp_path, capsys):
    """A run that dies after it was lengthened resumes like one that did not die."""
    for name in ("one", "two"):
        run(name, 8)
    run("one", 20, resume=True)
    with pytest.raises(Stop):
        run("two", 20, resume=True, left=5, checkpoint_every=200)
    main(["--resume", "--out", str(tmp_path / "two")])
    lines = read_lines(tmp_path / "one" / "metrics.jsonl")
    expected = [SMALL["lr"] * schedule(step, 20, 1, 0.2) for step in range(8, 20)]
    assert [line["lr"] for line in lines][8:] == expected
    one, two = (read_tensors(tmp_path / n / "sae/sae.safetensors") for n in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_fewer_steps_than_are_done_are_refused(run, tmp_path):
    run("run", 8)
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(ValueError, match="steps must be at least 8, as many as .*run has done, go"):
        main(["--resume", "--out", str(tmp_path / "run"), "--steps", "7"])
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_resuming_with_other_threads_is_said(run, tmp_path, capsys):
    run("run", 4)
    path = tmp_path / "run" / "config.json"
    document, threads = json.loads(path.read_text()), torch.get_num_threads()
    path.write_text(json.dumps(document | {"threads": threads + 3}))
    run("run", 4, resume=True)
    said = f"this run began with {threads + 3} threads and now has {threads}: last bits may differ"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("form", ["fastsae", "sae_lens"])
def test_training_starts_from_an_sae(form, run, activations, tmp_path):
    """With a learning rate of next to nothing, the result is the SAE that training started from."""
    sae = run("first", 8)
    save(sae, tmp_path / "sae", form)
    words = ["--start-from", tmp_path / "sae", "--data", activations, "--out", tmp_path / "next"]
    words += ["--steps", 2, "--batch-size", 200, "--lr", 1e-30, "--recipe", "sae_lens"]
    main([str(word) for word in words])
    x = ActivationShards(activations).sample(200)
    with torch.no_grad():
        before, after = sae(x), load(tmp_path / "next")(x)
    # Scaled for training and back: a few roundings of each weight, in sums of k values and b_dec.
    rounding = 8 * torch.finfo(torch.float32).eps * before.abs().max().item()
    torch.testing.assert_close(after, before, rtol=0, atol=rounding)
    config = json.loads((tmp_path / "next" / "config.json").read_text())["config"]
    assert (config["d_sae"], config["activation"]["k"], config["by_norm"]) == (64, 4, False)
    assert config["optimizer"]["constraint"] == "unit"


def test_what_starting_from_an_sae_leaves_without_effect(run, tmp_path):
    sae = run("first", 2)
    for name, value in {"activation": "relu", "b-dec": "mean", "start-l0": "4"}.items():
        with pytest.raises(ValueError, match=f"--{name} has no effect with --start-from"):
            read_train(["--start-from", "x", f"--{name}", value], sae)
    with pytest.raises(ValueError, match="--resume takes the settings of .*: no --start-from"):
        read_train(["--resume", "--start-from", "x"])


@pytest.mark.parametrize("kind", ["transcoder", "crosscoder"])
def test_training_starts_from_an_sae_of_several_sources(kind, activations, tmp_path):
    x = ActivationShards(activations).rows(torch.arange(4000))
    np.save(tmp_path / "y.npy", (30 * x.flip(1) + 5).numpy())
    option = {"transcoder": "--target", "crosscoder": "--layers"}[kind]
    shared = ["--data", activations, option, tmp_path / "y.npy", "--batch-size", 200]
    first = ["--out", tmp_path / "first", "--steps", 8, "--d-sae", 64, "--k", 4, "--lr", 3e-3]
    following = ["--start-from", tmp_path / "first", "--out", tmp_path / "next", "--steps", 2]
    for words in (first, [*following, "--lr", 1e-30]):
        main([str(word) for word in (*shared, *words)])
    rows = x if kind == "transcoder" else torch.cat([x, 30 * x.flip(1) + 5], dim=1)
    with torch.no_grad():
        before, after = (load(tmp_path / name)(rows) for name in ("first", "next"))
    rounding = 32 * torch.finfo(torch.float32).eps * before.abs().max().item()
    torch.testing.assert_close(after, before, rtol=0, atol=rounding)
    config = json.loads((tmp_path / "next" / "config.json").read_text())["config"]
    first_config = json.loads((tmp_path / "first" / "config.json").read_text())["config"]
    if kind == "transcoder":
        assert config["optimizer"]["constraint"] == first_config["optimizer"]["constraint"]


def test_a_start_that_was_never_saved_cannot_be_resumed(run, activations, tmp_path, monkeypatch):
    sae = run("first", 2)
    config = train_config(out=str(tmp_path / "run"), steps=4, **SMALL)
    source = ActivationShards(activations)
    monkeypatch.setattr(Trainer, "save", lambda self, state: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Trainer(config, source, sae).fit()
    monkeypatch.undo()
    with pytest.raises(ValueError, match="began from another SAE and stopped before it was saved"):
        Trainer(config, source).fit(resume=True)


def test_what_an_sae_to_start_from_must_be(run, activations, tmp_path):
    sae = run("first", 2)
    config = train_config(out=str(tmp_path / "run"), steps=4, **SMALL)
    with torch.no_grad():
        sae.b_enc[3] = torch.nan
    with pytest.raises(ValueError, match="b_enc of the SAE to start from holds NaN or Inf"):
        Trainer(config, ActivationShards(activations), sae)
    relu = SAE(16, 64, ReLU(l1_coef=0.0))
    with pytest.raises(ValueError, match="no sparsity penalty: give --target-l0 or --l1-coef"):
        read_train(["--start-from", "x"], relu)
    for words, settings in {
        ("--l1-coef", "5"): (5.0, None),
        ("--target-l0", "7"): (None, 7),
    }.items():
        cfg = read_train(["--start-from", "x", *words], relu).config.activation
        assert isinstance(cfg, ReLUConfig) and (cfg.l1_coef, cfg.target_l0) == settings
    trainer = Trainer(
        train_config(activation="relu", l1_coef=5.0, d_sae=64, out=str(tmp_path / "run")),
        ActivationShards(activations),
        relu,
    )
    (tmp_path / "run").mkdir()
    activation = trainer.start(False, None).sae.activation
    assert isinstance(activation, ReLU) and activation.coefficient.value == 5.0
