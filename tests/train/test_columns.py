"""Every activation through the trainer; transcoders and crosscoders from data to saved SAE."""

import dataclasses
import json

import numpy as np
import pytest
import torch

import fastsae
from fastsae.data import ActivationShards, Joined
from fastsae.evals import reconstruction
from fastsae.nn.activations import CHOICES
from fastsae.train import Optimizer, TrainConfig, Trainer
from fastsae.train.log import read_lines
from fastsae.train.results import EVALUATION_BATCH

from .conftest import train_config

pytestmark = pytest.mark.usefixtures("undrawn")
SMALL = {"d_sae": 64, "batch_size": 200, "lr": 3e-3, "log_every": 5, "steps": 100}


@pytest.fixture(scope="module")
def folders(activations, tmp_path_factory):
    """Files of the same tokens: activations, and a linear image of them of another scale."""
    x = np.load(activations)
    mixed = 30 * x @ np.random.default_rng(0).standard_normal((16, 16)).astype("f4")
    path = tmp_path_factory.mktemp("mixed") / "mixed.npy"
    np.save(path, mixed)
    narrow = path.with_name("narrow.npy")
    np.save(narrow, mixed[:, :6])
    return {"x": activations, "y": path, "narrow": narrow}


def trained(config, *paths):
    source = [ActivationShards(path) for path in paths]
    sae = Trainer(config, Joined(*source) if len(source) > 1 else source[0]).fit()
    summary = json.loads((config.out / "summary.json").read_text())
    return sae, summary, read_lines(config.out / "metrics.jsonl")


@pytest.mark.parametrize("name", CHOICES)
def test_every_activation_trains_and_is_saved(name, activations, tmp_path):
    k = {"k": 4} if hasattr(CHOICES[name], "k") else {}
    target = {"target_l0": 4.0} if not k else {}
    config = train_config(activation=name, out=str(tmp_path / "run"), **SMALL, **k, **target)
    sae, summary, lines = trained(config, activations)
    assert lines[-1]["fvu"] < 0.7 * lines[0]["fvu"]
    assert np.isfinite([line["penalty"] for line in lines]).all()
    again = fastsae.load(tmp_path / "run" / "sae")
    assert again.activation.cfg == config.activation
    data = ActivationShards(activations)
    found = reconstruction(again, data, batch_size=EVALUATION_BATCH).fvu
    assert found == summary["fvu"], "as trained, for data as they are"
    assert torch.equal(again(data.sample(50)), sae.eval()(data.sample(50)))


@pytest.mark.parametrize("settings", [{}, {"skip": True}, {"skip": True, "layer_norm": True}])
@pytest.mark.parametrize("target", ["y", "narrow"])
def test_a_transcoder_learns_another_activation(folders, tmp_path, target, settings):
    config = train_config(k=8, target=str(folders[target]), out=str(tmp_path / "run"), **SMALL)
    config = dataclasses.replace(config, **settings)
    sae, summary, lines = trained(config, folders["x"], folders[target])
    assert summary["fvu"] < 0.5 * lines[0]["fvu"]
    x, y = (torch.from_numpy(np.load(folders[name])) for name in ("x", target))
    sae = fastsae.load(tmp_path / "run" / "sae")
    fvu = (y - sae(x).detach()).square().sum() / (y - y.mean(0)).square().sum()
    assert float(fvu) == pytest.approx(summary["fvu"], rel=1e-4)
    assert bool(sae.W_skip is not None and sae.W_skip.detach().any()) == ("skip" in settings)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_a_crosscoder_codes_layers_together(folders, tmp_path, layer_norm):
    config = train_config(k=8, out=str(tmp_path / "run"), **SMALL)
    config = dataclasses.replace(config, layers=(folders["y"],), layer_norm=layer_norm)
    sae, summary, lines = trained(config, folders["x"], folders["y"])
    assert summary["fvu"] < 0.5 * lines[0]["fvu"]
    assert sae.decoder_norms().shape == (64, 2)
    x, y = (torch.from_numpy(np.load(folders[name])) for name in ("x", "y"))
    for layer, recon in zip((x, y), sae(torch.cat([x, y], dim=1)).split(16, 1), strict=True):
        fvu = (layer - recon).square().sum() / (layer - layer.mean(0)).square().sum()
        assert fvu < 0.5, "each layer counts alike, though one is 30 times as large"


@pytest.mark.parametrize("step", ["fused", "autograd"])
def test_layer_norm_is_in_the_saved_sae(folders, tmp_path, step):
    """Its metrics refer to the activations as given, whatever their scale."""
    settings = {**SMALL, "k": 4, "layer_norm": True, "step": step}
    config = train_config(out=str(tmp_path / "run"), **settings)
    sae, summary, lines = trained(config, folders["y"])
    assert summary["step_path"] == step
    assert lines[-1]["fvu"] < 0.7 * lines[0]["fvu"]
    again, x = fastsae.load(tmp_path / "run" / "sae"), torch.from_numpy(np.load(folders["y"]))
    assert again.layer_norm and torch.equal(again(x), sae.eval()(x))
    fvu = (x - again(x).detach()).square().sum() / (x - x.mean(0)).square().sum()
    assert float(fvu) == pytest.approx(summary["fvu"], rel=1e-4)
    assert fvu < 0.7 * lines[0]["fvu"]
    lens = fastsae.load(tmp_path / "run" / "sae_lens")
    assert lens.layer_norm and torch.equal(lens(x), again(x))


def test_data_that_does_not_fit_is_refused(folders, tmp_path):
    x, y, narrow = (ActivationShards(path) for path in folders.values())
    config = TrainConfig(out=tmp_path, target=folders["y"])
    with pytest.raises(ValueError, match="for activations of 2 modules, the data has 1"):
        Trainer(config, x)
    crosscoder = TrainConfig(out=tmp_path, layers=(folders["narrow"],))
    with pytest.raises(ValueError, match=r"layers must have one width, got \[16, 6\]"):
        Trainer(crosscoder, Joined(x, narrow))
    aligned = Optimizer(constraint="aligned")
    with pytest.raises(ValueError, match='constraint "aligned" needs an autoencoder'):
        TrainConfig(out=tmp_path, target=folders["y"], optimizer=aligned)


def test_averaged_and_aligned_weights(activations, tmp_path):
    config = train_config(k=4, out=str(tmp_path / "ema"), ema=0.9, **SMALL)
    sae, summary, lines = trained(config, activations)
    assert summary["fvu"] < 0.7 * lines[0]["fvu"]
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))
    config = train_config(k=4, out=str(tmp_path / "aligned"), constraint="aligned", **SMALL)
    sae, summary, lines = trained(config, activations)
    assert summary["fvu"] < 0.7 * lines[0]["fvu"]
    torch.testing.assert_close((sae.W_enc * sae.W_dec).sum(1), torch.ones(64))
