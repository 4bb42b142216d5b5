"""Training does not notice a large mean, nor a few tokens of extreme norm."""

import dataclasses
import json

import numpy as np
import pytest
import torch

import fastsae
from fastsae.data import ActivationShards, Joined
from fastsae.train import Trainer
from fastsae.train.log import read_lines
from fastsae.train.standardization import replace_rows

from .conftest import train_config

pytestmark = pytest.mark.usefixtures("undrawn")
SMALL = {"d_sae": 64, "batch_size": 200, "lr": 3e-3, "log_every": 5, "steps": 30}
KINDS = {
    "topk": {"k": 4},
    "layer norm": {"k": 4, "layer_norm": True},
    "gated": {"target_l0": 4.0},
    "variational": {"k": 4},
    "transcoder": {"k": 4},
    "gated transcoder": {"target_l0": 4.0},
    "crosscoder": {"k": 4},
}


def fitted(kind, x, y, out):
    """The SAE, its summary and its losses, for activations x (and those of another module, y)."""
    for name, rows in {"x": x, "y": y}.items():
        np.save(out / f"{name}.npy", rows)
    activation = kind.split()[0] if kind.split()[0] in ("gated", "variational") else "topk"
    config = train_config(activation=activation, out=str(out / "run"), **SMALL, **KINDS[kind])
    sources = [ActivationShards(out / "x.npy"), ActivationShards(out / "y.npy")]
    if "transcoder" in kind:
        config = dataclasses.replace(config, target=out / "y.npy", skip=True)
    elif kind == "crosscoder":
        config = dataclasses.replace(config, layers=(out / "y.npy",))
    else:
        sources = sources[:1]
    sae = Trainer(config, Joined(*sources) if len(sources) > 1 else sources[0]).fit()
    summary = json.loads((out / "run" / "summary.json").read_text())
    return sae, summary, read_lines(out / "run" / "metrics.jsonl")


@pytest.fixture(params=KINDS)
def runs(request, activations, tmp_path):
    """The kind, a run on ordinary data, that data, and the function for runs on other data."""
    x = np.load(activations)
    y = 30 * x @ np.random.default_rng(0).standard_normal((16, 16)).astype("f4")

    def run(name, x, y):
        out = tmp_path / name
        out.mkdir()
        return fitted(request.param, x, y, out)

    return request.param, run("plain", x, y), (x, y), run


def test_a_large_mean_changes_nothing(runs):
    kind, (sae, summary, lines), (x, y), run = runs
    if kind == "layer norm":  # it takes the tokens as they are
        pytest.skip("normalizes each token itself")
    offset = np.zeros(16, "f4")
    offset[5] = 1000
    moved, moved_summary, moved_lines = run("moved", x + offset * x.std(), y + offset * y.std())
    assert [line["fvu"] for line in moved_lines] == pytest.approx(
        [line["fvu"] for line in lines], rel=5e-3
    )
    assert moved_summary["fvu"] == pytest.approx(summary["fvu"], rel=5e-3)
    assert max(moved_summary["gamma"]) > 100 > max(summary["gamma"])


def test_extreme_tokens_change_nothing_for_the_others(runs, capsys):
    kind, (_, summary, _), (x, y), run = runs
    extreme = np.arange(0, len(x), 500)
    x, y = x.copy(), y.copy()
    x[extreme] *= 1000
    y[extreme] *= 1000
    _, found, _ = run("extreme", x, y)
    assert found["fvu"] == pytest.approx(summary["fvu"], rel=0.15)
    assert found["fvu_all"] != found["fvu"] and found["left_out_of_evaluation"] == len(extreme)
    assert (found["left_out_tokens"] > 0) == (kind != "layer norm"), "normalized, none is extreme"
    assert ("of tokens left out" in capsys.readouterr().err) == (kind != "layer norm")


def test_one_source_with_extreme_tokens_is_enough(activations, tmp_path):
    x = np.load(activations)
    y = x.copy()
    y[::500] *= 1000
    _, summary, _ = fitted("crosscoder", x, y, tmp_path)
    assert summary["left_out_of_evaluation"] == len(x[::500])
    assert 0 < summary["left_out_tokens"] < 0.01 * summary["tokens"]
    assert fastsae.load(tmp_path / "run").layers == 2


@pytest.mark.parametrize("kind", ["crosscoder", "transcoder"])
def test_sources_whose_ordinary_tokens_are_not_the_same(kind, activations, tmp_path):
    x, y = np.load(activations), np.load(activations)
    x[::2] *= 1000
    y[1::2] *= 1000
    with pytest.raises(ValueError, match=r"^100.0% of tokens .* raise --max-norm-ratio, .* 10.0"):
        fitted(kind, x, y, tmp_path)
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    ("kept", "rows"),
    [
        ([1, 1, 1, 1], [0, 1, 2, 3]),
        ([1, 0, 0, 1], [0, 0, 0, 3]),
        ([0, 0, 1, 0], [2, 2, 2, 2]),
        ([0, 1, 0, 1], [3, 1, 1, 3]),
        ([0, 0, 0, 0], [3, 3, 3, 3]),
    ],
)
def test_rows_are_replaced_by_those_before_them(kept, rows):
    x = torch.arange(4.0)[:, None].expand(4, 3).contiguous()
    assert replace_rows(x, torch.tensor(kept, dtype=torch.bool))[:, 0].tolist() == rows


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_activations_without_float32_squares_are_refused(scale, activations, tmp_path):
    with pytest.raises(ValueError, match="must have a spread from 1e-15 to 1e15, got .*e.25"):
        fitted("topk", scale * np.load(activations), np.load(activations), tmp_path)


def test_the_data_of_a_source_stay_as_they_are(activations, tmp_path):
    """Also if it hands out its own memory."""
    source = ActivationShards(activations)
    rows = source.rows(torch.arange(source.n_tokens))
    before = rows.clone()
    source.sample = lambda n, seed=0: rows[:n]
    Trainer(train_config(k=4, out=str(tmp_path / "run"), **SMALL), source).fit()
    assert torch.equal(rows, before)
