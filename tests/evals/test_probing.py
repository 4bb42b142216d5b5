"""Probes on planted labels, on random labels, and on labels derived from text."""

import json
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from fastsae.config import to_dict
from fastsae.data import ActivationShards, HarvestConfig, Joined, Synthetic, harvest
from fastsae.data.model import load_tokenizer
from fastsae.evals import probing, sparse_probing
from fastsae.evals.probing import text_labels
from fastsae.nn import SAE, TopK, init_from_data

from .conftest import identity

N, D = 3000, 16


def signs() -> torch.Tensor:
    return torch.rand(N) < 0.3


def stored(x: torch.Tensor, folder: Path) -> ActivationShards:
    np.save(folder / "x.npy", x.numpy())
    return ActivationShards(folder / "x.npy")


def test_a_latent_that_is_the_label_is_found(tmp_path: Path):
    """Coordinate 3 is the label outright, and latent 40 of a wide SAE is too."""
    label, x = signs(), torch.randn(N, D)
    x[:, 3] = label.float()
    wide = SAE(D, 64, TopK(1))
    with torch.no_grad():
        wide.W_enc.zero_()
        wide.W_enc[40, 3] = 1
    for sae, latent in ((identity(D), 3), (wide, 40)):
        found = sparse_probing(sae, stored(x, tmp_path), labels={"planted": label})
        assert found.accuracy == found.baseline == {"1": 1.0, "5": 1.0}
        assert found.label_latents["planted"][0] == latent
        assert found.tokens == N
        assert found.label_tokens["planted"] == 2 * int(label[N * 3 // 4 :].sum())


def test_two_latents_tell_more_than_one(tmp_path: Path):
    """The label is whether two coordinates add up to something positive."""
    x = torch.randn(N, D)
    data = stored(x, tmp_path)
    label = x[:, 5] + x[:, 9] > 0
    found = sparse_probing(identity(D), data, labels={"sum": label}, ks=[1, 2])
    assert set(found.label_latents["sum"]) == {5, 9}
    assert found.accuracy["1"] == pytest.approx(0.75, abs=0.05)
    assert found.accuracy["2"] > 0.97


def test_a_label_of_nothing_is_guessed(tmp_path: Path):
    labels = {f"{n}": signs() for n in range(8)}
    sae = SAE(D, 64, TopK(8))
    found = sparse_probing(sae, stored(torch.randn(N, D), tmp_path), labels=labels)
    for value in (*found.accuracy.values(), *found.baseline.values()):
        assert value == pytest.approx(0.5, abs=0.04)
    assert found.accuracy["1"] == pytest.approx(
        np.mean([by_k["1"] for by_k in found.label_accuracy.values()])
    )


@pytest.mark.parametrize("k", [3, 40])  # codes that are kept, and codes that are made again
def test_same_seed_same_result_whatever_the_chunks(
    k: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    x = torch.randn(N, D)
    data, labels = stored(x, tmp_path), {"a": x[:, 0] + torch.randn(N) > 0, "b": x[:, 1] > 0.5}
    sae = SAE(D, 64, TopK(k))
    found = sparse_probing(sae, data, labels=labels)
    assert found == sparse_probing(sae, data, labels=dict(reversed(labels.items())))
    assert found != sparse_probing(sae, data, labels=labels, seed=1)
    monkeypatch.setattr(probing, "CHUNK_ENTRIES", 64 * 50)
    assert found == sparse_probing(sae, data, labels=labels)
    assert json.loads(json.dumps(to_dict(found))) == to_dict(found)


def test_latents_are_chosen_by_their_correlation_with_the_label():
    split = probing._split(signs(), seed=0)
    assert split is not None
    x = torch.randn(N, D) * torch.logspace(-2, 2, D) + 5
    x[:, 7] = 3  # constant
    found = probing._contrasts([x[:1000], x[1000:]].__getitem__, 2, [split])[0]
    rows, y = x[split.train].double().numpy(), split.label[split.train].numpy()
    gap = np.abs(rows[y].mean(0) - rows[~y].mean(0))
    wanted = np.divide(gap, rows.std(0), out=np.zeros(D), where=rows.std(0) > 0)
    assert found.numpy() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("spread", [1.0, 30.0])  # separable, and so far apart that steps overshoot
def test_the_regression_is_at_its_optimum(spread: float):
    sign = signs().double() * 2 - 1
    x = torch.cat([torch.randn(N, 4).double(), torch.ones(N, 1).double()], 1)
    x[:, 0] += spread * sign
    w = probing._logistic(x, sign).requires_grad_()
    loss = torch.nn.functional.softplus(-sign * (x @ w)).mean() + probing.RIDGE / 2 * (w @ w)
    (gradient,) = torch.autograd.grad(loss, w)
    assert float(gradient.norm()) < 1e-4


@pytest.mark.parametrize("n, wanted", [(1000, 2000), (10**6, 5000), (300, 299), (700, 600)])
def test_rows_are_spread_over_the_data(n: int, wanted: int):
    rows = probing._spread(n, wanted)
    assert min(n, wanted) - probing.RUN < len(rows) <= wanted
    assert torch.equal(rows, rows.unique())
    assert int(rows[0]) == 0 and int(rows[-1]) < n
    if wanted >= 2 * probing.RUN:
        assert int(rows[-1]) == n - 1


CODE = "def area(shape):\n    return shape.width * 12 .\n"
PROSE = "It was a long day, and nobody said anything about it at all; not one of us did.\n"


def code_data(model: Path, folder: Path, *texts: str) -> ActivationShards:
    (folder / "text").mkdir()
    for number, text in enumerate(texts):
        (folder / "text" / f"{number}.txt").write_text(text)
    config = HarvestConfig(
        model=str(model),
        hookpoint="encoder.layer.0",
        out=folder / "out",
        text=(str(folder / "text"),),
        context_length=128,
        heldout_fraction=0.0,
    )
    return harvest(config, progress=False)


def test_labels_of_text(bert: Path, tmp_path: Path):
    data = code_data(bert, tmp_path, CODE, PROSE)
    labels = text_labels(data, torch.arange(data.n_tokens))
    contexts = data.contexts(torch.arange(data.n_tokens))
    tokens = load_tokenizer(str(bert)).convert_ids_to_tokens(contexts.token_ids.tolist())
    named = {
        name: [token for token, is_so in zip(tokens, label.tolist(), strict=True) if is_so]
        for name, label in labels.items()
    }
    assert named["keyword"] == ["def", "return", "and", "not"]
    assert named["number"] == ["12"]
    assert named["punctuation"] == ["(", ")", ":", ".", "*", ".", ",", ";", "."]
    assert named["attribute"] == ["width"]  # and not what begins the next text
    assert named["defined"] == ["area"]
    assert named["called"] == ["area"]
    assert named["prose"] == tokens[tokens.index("it") :]
    assert torch.equal(labels["late"], contexts.positions > int(contexts.positions.max()) / 2)
    for rows in (torch.tensor([9]), torch.tensor([0, 7, data.n_tokens - 1])):  # as among all rows
        for name, label in text_labels(data, rows).items():
            assert name == "late" or torch.equal(label, labels[name][rows])


def test_text_of_code(minilm: Path, tmp_path: Path):
    """Real activations predict properties of their token; so do joined ones."""
    data = code_data(minilm, tmp_path, Path(textwrap.__file__).read_text())
    sae = init_from_data(SAE(384, 512, TopK(16)), data.sample(1000))
    found = sparse_probing(sae, data, max_tokens=4000)
    assert {"keyword", "punctuation", "prose", "late"} <= found.label_accuracy.keys()
    assert found.label_baseline["punctuation"]["5"] > 0.85
    assert found.label_accuracy["punctuation"]["5"] > 0.6
    both = sparse_probing(SAE(768, 64, TopK(8)), Joined(data, data), max_tokens=4000)
    assert both.label_tokens == found.label_tokens
    assert both.label_baseline["late"]["1"] == found.label_baseline["late"]["1"]


def test_a_transcoder_and_the_mode_of_training():
    data = Synthetic(d_in=D, n_latents=20, active=3, n_tokens=N)
    sae = SAE(D, 64, TopK(8), d_out=5).train()
    found = sparse_probing(sae, data, labels={"a": signs()}, max_tokens=2000)
    assert sae.training and 1700 < found.tokens <= 2000


RARE = torch.arange(N) < 40


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sae": SAE(D + 1, 32, TopK(4))}, "d_in = 17, the data has rows of 16"),
        ({"ks": []}, r"ks must be from 1 to 16, .* got \[\]"),
        ({"ks": [0]}, r"ks must be from 1 to 16, .* got \[0\]"),
        ({"ks": [1, 17]}, r"ks must be from 1 to 16, .* got \[1, 17\]"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"labels": None}, "text of the data is unknown: pass labels"),
        ({"labels": {}}, "no labels were given"),
        (
            {"labels": {"a": RARE[1:]}},
            r"'a' must have an entry for each of the 3000 rows.*\[2999\]",
        ),
        ({"labels": {"a": RARE, "b": torch.arange(N) % 2 == 0}}, "too rare: a$"),
    ],
)
def test_mistakes_are_named(change: dict, message: str):
    data = Synthetic(d_in=D, n_latents=20, active=3, n_tokens=N)
    arguments = {"sae": SAE(D, 32, TopK(4)), "data": data, "labels": {"a": RARE}, **change}
    with pytest.raises(ValueError, match=message):
        sparse_probing(**arguments)


def test_text_with_too_little_of_every_label(bert_data: ActivationShards):
    with pytest.raises(ValueError, match="too rare: .*"):
        sparse_probing(SAE(D, 32, TopK(4)), bert_data, max_tokens=40)


def test_rows_that_are_not_numbers_are_named(tmp_path: Path):
    x = torch.randn(N, D)
    x[7, 3] = torch.nan
    with pytest.raises(ValueError, match=r"x\.npy row 7"):
        sparse_probing(identity(D), stored(x, tmp_path), labels={"a": signs()})
