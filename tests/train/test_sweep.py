"""SAEs trained together are those trained alone, interrupted or not."""

import dataclasses
import json

import numpy as np
import pytest
import torch

import fastsae
from fastsae.cli.sweep import main, read_sweep
from fastsae.data import ActivationShards, Joined
from fastsae.nn import BatchTopKConfig, JumpReLUConfig, RationalConfig, TopKConfig
from fastsae.train import Sweep, Trainer
from fastsae.train.log import read_lines
from fastsae.train.sweep import begin, stored_sweep
from fastsae_kernels.encode import encode_topk_each, encode_topk_reference
from fastsae_kernels.topk import By

from .conftest import Stop, StoppingShards, train_config

pytestmark = pytest.mark.usefixtures("undrawn")
SMALL = {"d_sae": 64, "batch_size": 200, "lr": 3e-3, "log_every": 5, "dead_after": 2000}
SAES = {
    "k4": {"k": 4},
    "k8": {"k": 8, "seed": 1},
    "abs": {"activation": "abstopk", "k": 4},
    "batch": {"activation": "batchtopk", "k": 4},
    "jump": {"activation": "jumprelu", "target_l0": 4.0},
}
TWO = {"k4": {"k": 4}, "k8": {"k": 8}}
NORMED = {"k4": {"k": 4, "layer_norm": True}, "k8": {"k": 8, "layer_norm": True}}


@pytest.fixture
def configs(activations):
    def build(steps=30, saes=SAES, **settings):
        shared = {"data": str(activations), "steps": steps, "data_seed": 0, **SMALL, **settings}
        return {name: train_config(**shared, **own) for name, own in saes.items()}

    return build


def losses(out):
    return [line["loss"] for line in read_lines(out / "metrics.jsonl")]


@pytest.mark.parametrize("saes", [SAES, NORMED], ids=["plain", "layer_norm"])
def test_a_sweep_trains_what_single_runs_train(saes, configs, activations, tmp_path):
    source = ActivationShards(activations)
    Sweep(configs(saes=saes), source, tmp_path / "sweep").fit()
    found = json.loads((tmp_path / "sweep" / "comparison.json").read_text())
    assert list(found) == list(saes)
    assert (tmp_path / "sweep" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    for name, config in configs(saes=saes).items():
        out = tmp_path / name
        Trainer(dataclasses.replace(config, out=out), source).fit()
        together, single = losses(tmp_path / "sweep" / name), losses(out)
        if name in ("batch", "jump"):
            assert together == single, "these share nothing but the data"
        # Adam's first steps are as long for a gradient that is all rounding as for any other
        np.testing.assert_allclose(together, single, rtol=1e-2)
        sae = fastsae.load(tmp_path / "sweep" / name / "sae")
        assert sae.activation.cfg == config.activation


@pytest.mark.parametrize("s", [0, 1, 2])
def test_a_shared_product_gives_the_same_codes(device, s):
    choices: list[tuple[int, By]] = [(4, "value"), (8, "abs"), (64, "value")]
    rows = slice(64 * s, 64 * (s + 1))
    x, W, b = (torch.randn(*size, device=device) for size in ((300, 16), (192, 16), (192,)))

    def alone(x, W, b):
        return encode_topk_reference(x, W[rows], b[rows], *choices[s])

    with torch.no_grad():
        values, indices = encode_topk_each(x, W, b, choices)[s]
        (same, places), (exact, _) = alone(x, W, b), alone(x.double(), W.double(), b.double())
    assert torch.equal(indices, places)
    assert (values - exact).abs().max() <= 2 * (same - exact).abs().max()


def test_resuming_changes_no_bit(configs, activations, tmp_path):
    settings = configs(checkpoint_every=4)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    Sweep(settings, ActivationShards(activations), whole).fit()
    for resume, left in ((False, 11), (True, 9)):
        with pytest.raises(Stop):
            Sweep(settings, StoppingShards(activations, left), broken).fit(resume)
    last = sorted((broken / "abs" / "checkpoints").iterdir())[-1]
    for file in last.iterdir():  # as if the sweep had been killed between two runs' checkpoints
        file.unlink()
    last.rmdir()
    Sweep(stored_sweep(broken), ActivationShards(activations), broken).fit(resume=True)
    for name in SAES:
        one, two = (out / name / "sae" / "sae.safetensors" for out in (whole, broken))
        assert one.read_bytes() == two.read_bytes(), name
        assert losses(whole / name) == losses(broken / name)


def test_what_does_not_go_together_is_refused(configs, activations, tmp_path):
    source, one, two = ActivationShards(activations), configs(), configs(steps=31)
    with pytest.raises(ValueError, match="at least one SAE"):
        Sweep({}, source, tmp_path)
    with pytest.raises(ValueError, match="must share steps, got 30 and 31"):
        Sweep({"a": one["k4"], "b": two["k4"]}, source, tmp_path)
    with pytest.raises(ValueError, match="must keep 2 checkpoints or more, got .* = 1"):
        Sweep(configs(keep_checkpoints=1), source, tmp_path).fit()
    with pytest.raises(ValueError, match="holds no sweep to resume"):
        stored_sweep(tmp_path)
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is not empty and holds no sweep"):
        Sweep(one, source, tmp_path).fit()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"runs": {}}, "is not the record of a fastsae.sweep.1 folder"),
        ({"runs": {"../k4": {}}}, r"'\.\./k4' is not the name of a folder"),
        ({"runs": {"k4": {"rate": 1}}}, "'k4' has no setting 'rate'"),
    ],
)
def test_a_damaged_record_names_the_version_that_wrote_it(changed, message, configs, tmp_path):
    begin(tmp_path, configs())
    assert list(stored_sweep(tmp_path)) == list(SAES)
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": "9.9.9"} | changed))
    with pytest.raises(ValueError, match=f"{message}.* .written by fastsae '9.9.9', this is"):
        stored_sweep(tmp_path)


def test_an_error_names_the_sae(configs, activations, tmp_path):
    settings = configs()
    optimizer = dataclasses.replace(settings["abs"].optimizer, lr=1e20)
    settings["abs"] = dataclasses.replace(settings["abs"], optimizer=optimizer)
    with pytest.raises(ValueError, match="abs: the loss is NaN or Inf"):
        Sweep(settings, ActivationShards(activations), tmp_path / "sweep").fit()


def test_data_that_no_sae_can_be_trained_on_leaves_the_folder_empty(configs, activations, tmp_path):
    """Another try, with a setting that keeps the tokens, then finds no sweep there."""
    x = np.load(activations)
    np.save(tmp_path / "x.npy", x * np.where(np.arange(len(x)) % 2, 1000, 1)[:, None])
    np.save(tmp_path / "y.npy", x * np.where(np.arange(len(x)) % 2, 1, 1000)[:, None])
    source = Joined(*(ActivationShards(tmp_path / f"{name}.npy") for name in "xy"))
    layers, out = [str(tmp_path / "y.npy")], tmp_path / "sweep"
    with pytest.raises(ValueError, match="few tokens are within the norm limit in every source"):
        Sweep(configs(steps=1, saes=TWO, layers=layers), source, out).fit()
    Sweep(configs(steps=1, saes=TWO, layers=layers, max_norm_ratio=None), source, out).fit()


def described(*words):
    return read_sweep(words)[1]


def test_what_the_words_of_a_sweep_mean():
    found = described("topk:k=16", "batchtopk:lr=0.01", "jumprelu", "--k", "8", "--seed", "3")
    assert list(found) == ["topk-k=16", "batchtopk-lr=0.01", "jumprelu"]
    one, two, three = found.values()
    assert one.activation == TopKConfig(k=16)
    assert two.activation == BatchTopKConfig(k=8), "what is given to all is each one's that has it"
    assert two.optimizer.lr == 0.01
    assert three.activation == JumpReLUConfig()
    assert [config.seed for config in found.values()] == [3, 3, 3]
    seeds = described("abstopk", "--seeds", "4", "5")
    assert {name: c.seed for name, c in seeds.items()} == {"abstopk-seed4": 4, "abstopk-seed5": 5}
    assert seeds["abstopk-seed4"].activation == TopKConfig(by="abs")


def test_only_what_is_given_is_set_for_all():
    """Also what equals a default; the activation that names the options gives none."""
    found = described("--k", "32", "topk", "rational", "--activation", "abstopk")
    assert [c.activation for c in found.values()] == [TopKConfig(), RationalConfig(k=32)]
    found = described("--by", "value", "topk", "batchabstopk", "topk:by=abs")
    assert [c.activation for c in found.values()] == [
        TopKConfig(),
        BatchTopKConfig(by="abs"),
        TopKConfig(by="abs"),
    ]
    found = described("--rotation", "dense", "topk:gradient=rotation,k=4", "--d-sae", "16")
    (one,) = found.values()
    assert one.activation == TopKConfig(k=4, gradient="rotation", rotation="dense")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["relu", "gated", "--k", "3"], "none of relu, gated has the setting k"),
        (["topk:seed=5", "--seeds", "0", "1"], "seed cannot be set per SAE in a sweep"),
        (["topk:recipe=openai"], "recipe cannot be set per SAE in a sweep"),
    ],
)
def test_words_without_effect_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        described(*words)


def test_what_does_not_go_together_is_refused_before_data_are_opened():
    with pytest.raises(ValueError, match="must share eval_every, got 5 and 6"):
        main(["topk:k=2,eval-every=5", "topk:k=4,eval-every=6", "--data", "nowhere"])


def test_a_damaged_checkpoint_takes_all_saes_back_to_the_one_before(configs, activations, tmp_path):
    few = {name: SAES[name] for name in ("k4", "k8")}
    sweep = Sweep(configs(saes=few, checkpoint_every=10), ActivationShards(activations), tmp_path)
    saved = {name: sae.W_dec.clone() for name, sae in sweep.fit().items()}
    path = tmp_path / "k8" / "checkpoints" / "step-00000030" / "state.json"
    path.write_text(path.read_text().replace('"tokens": 6000', '"tokens": 6001'))
    states = sweep.start(resume=True)
    assert [state.step for state in states.values()] == [20, 20]
    again = sweep.fit(resume=True)
    assert all(torch.equal(again[name].W_dec, saved[name]) for name in few)
