"""Dashboards for Neuronpedia: complete, valid, and of what a dense computation gives."""

import copy
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from fastsae.data import ActivationArray, Joined, StoredActivations
from fastsae.nn import SAE, AbsTopK, TopK
from fastsae.report import ReportConfig, write_report
from fastsae.report.correlations import LatentSums, correlated_inputs, correlated_latents
from fastsae.report.firings import collect
from fastsae.report.neuronpedia import dataset, layer_number, new_folder
from fastsae.report.text import plain

from .conftest import HOSTILE, VOCABULARY, WIDTH
from .kinds import D_IN, D_OUT, build

STRINGS = {"model_id", "sae_set", "dataset"}
LISTS = {
    **dict.fromkeys(("neuron_alignment", "correlated_neurons", "correlated_features"), 3),
    **dict.fromkeys(("neg", "pos"), 10),
    **dict.fromkeys(("freq_hist_data_bar", "logits_hist_data_bar"), 50),
}


def exported(sae: SAE, data: StoredActivations, folder: Path, **settings) -> Path:
    config = ReportConfig(neuronpedia=folder / "batches", projection="pca", **settings)
    write_report(sae, data, config, folder / "report.html", progress=False)
    return folder / "batches"


def no_constant(name: str):
    raise AssertionError(f"{name} is not JSON")


def read(path: Path) -> dict:
    return json.loads(path.read_bytes().decode(), parse_constant=no_constant)


@pytest.fixture(scope="module")
def batches(world, tmp_path_factory) -> Path:
    return exported(world.sae, world.heldout, tmp_path_factory.mktemp("a"), max_norm_ratio=None)


@pytest.fixture(scope="module")
def dense(world) -> tuple[np.ndarray, np.ndarray]:
    """The inputs and the codes of all tokens."""
    x = world.heldout.rows(torch.arange(world.heldout.n_tokens))
    with torch.no_grad():
        return x.numpy(), world.sae.encode(x).to_dense().numpy()


def test_every_dashboard_is_complete(batches, world):
    found, about = read(batches / "batch-0.json"), read(batches / "provenance.json")
    assert sorted(path.name for path in batches.iterdir()) == ["batch-0.json", "provenance.json"]
    assert (found["layer"], found["sae_set"], found["sae_id_suffix"]) == (0, "report", None)
    assert found["model_id"] == world.model.name and about["hookpoint"] == "transformer.h.0"
    assert about["tokens"] == world.heldout.n_tokens and about["notes"] == []
    assert about["model"] == world.model.name
    assert about["latents"] == len(found["features"]) > WIDTH / 2
    check(found["features"])


def check(features: list[dict]) -> None:
    for feature in features:
        lengths = {name: len(value) for name, value in feature.items() if isinstance(value, list)}
        for stem, length in LISTS.items():
            assert {n for name, n in lengths.items() if name.startswith(stem)} == {length}
        assert feature["n_prompts_total"] == 150 and feature["n_tokens_in_prompt"] == 12
        assert feature["activations"]
        for one in feature["activations"]:
            assert len(one["tokens"]) == len(one["values"]) <= 12
            peak = one["values"][one["qualifying_token_index"]]
            assert one["bin_min"] <= peak <= one["bin_max"]
            assert one["bin_contains"] == -1 or 0 < one["bin_contains"] <= feature["frac_nonzero"]


def test_intervals_of_signed_codes_are_of_one_sign(world, tmp_path):
    sae = SAE(WIDTH, WIDTH + 8, AbsTopK(2)).eval()
    (found,) = (
        read(path)["features"]
        for path in exported(sae, world.heldout, tmp_path).glob("batch-*.json")
    )
    check(found)
    ends = {(one["bin_min"], one["bin_max"]) for a in found for one in a["activations"]}
    assert all(low <= high for low, high in ends)
    assert any(high == 0 for _, high in ends) and any(high < 0 for _, high in ends)


def test_published_names_have_no_directories_of_this_machine():
    def named(**harvest) -> str:
        return dataset(ActivationArray(torch.randn(2, 3), harvest=harvest))

    assert named(dataset="owner/name") == "owner/name" and named() == ""
    assert named(dataset="/home/me/texts") == "texts" and len(named(dataset="x" * 300)) == 300
    assert named(text=["/home/me/a.txt", "docs/*.md"]) == "a.txt, docs/*.md"


def test_the_layer_is_that_of_the_first_hookpoint():
    for name, layer in {"h.3.mlp": 3, "h.3 + h.5": 3, "embed + h.5": None, "": None}.items():
        assert layer_number(name) == layer


def test_values_are_those_of_the_dense_codes(batches, world, dense):
    x, codes = dense
    close = partial(np.testing.assert_allclose, rtol=1e-3)
    for feature in read(batches / "batch-0.json")["features"][:6]:
        latent = feature["feature_index"]
        own = codes[:, latent]
        close(feature["frac_nonzero"], (own != 0).mean())
        heights, edges = np.histogram(own[own != 0].astype(float), 50)
        assert feature["freq_hist_data_bar_heights"] == heights.tolist()
        close(feature["freq_hist_data_bar_values"], (edges[1:] + edges[:-1]) / 2)
        row = world.sae.W_dec[latent].detach().numpy()
        best = np.argsort(-row)[:3]
        assert feature["neuron_alignment_indices"] == best.tolist()
        close(feature["neuron_alignment_values"], row[best])
        close(feature["neuron_alignment_l1"], np.abs(row[best]) / np.abs(row).sum())
        tokens, *_ = world.heldout.contexts(torch.arange(len(own)))
        texts = np.array([plain(text) for text in VOCABULARY])[tokens.numpy()]
        for one in feature["activations"]:
            n = len(one["values"])
            assert any(
                np.allclose(own[start : start + n], one["values"], rtol=1e-3)
                and (texts[start : start + n] == one["tokens"]).all()
                for start in range(len(own) - n + 1)
            )


@pytest.mark.parametrize("kind", ["topk", "abstopk", "rational of every latent", "skip transcoder"])
def test_correlations_are_those_of_the_dense_codes(kind):
    sae, x = build(kind), torch.randn(400, D_IN) + 20
    data = ActivationArray(x)
    if sae.d_out:
        data = Joined(data, ActivationArray(torch.randn(400, D_OUT)))
    config = ReportConfig(neuronpedia=Path("unused"), batch_size=150)
    found = collect(sae, data, config, progress=False)
    codes = sae.encode(x).to_dense().detach().double().numpy()
    active = np.flatnonzero(codes.std(0))
    latents, sums = active[:8].tolist(), LatentSums.of(found)
    assert found.inputs is not None
    inputs = correlated_inputs(found, sums, found.inputs, latents, x[found.rows].split(70))
    others = correlated_latents(found, sums, latents)
    norms = np.linalg.norm(codes, axis=0)
    for latent, *tables in zip(latents, inputs, others, strict=True):
        for table, y in zip(tables, (x.double().numpy(), codes), strict=True):
            with np.errstate(invalid="ignore"):
                pearson = np.corrcoef(codes[:, latent], y.T)[0, 1:]
                cosine = codes[:, latent] @ y / (norms[latent] * np.linalg.norm(y, axis=0))
            if y is codes:
                pearson[latent] = np.nan
            pearson = np.nan_to_num(pearson, nan=-2)
            np.testing.assert_allclose(table.pearson, np.sort(pearson)[:-4:-1], atol=1e-4)
            np.testing.assert_allclose(table.pearson, pearson[table.indices], atol=1e-4)
            np.testing.assert_allclose(table.cosine, cosine[table.indices], atol=1e-4)


def test_tokens_are_valid_text_with_their_line_breaks(batches):
    features = read(batches / "batch-0.json")["features"]
    tokens = {token for one in features for a in one["activations"] for token in a["tokens"]}
    tokens |= {token for one in features for token in one["pos_str"] + one["neg_str"]}
    assert {plain(text) for text in HOSTILE} <= tokens
    assert any("\n" in token for token in tokens)
    kept = set("".join(tokens)) - {"\n", "\t", "\r"}
    assert min(kept) >= " " and "\x7f" not in kept
    assert plain("a\x00\ud800\u202e\n") == "a\\x00\\ud800\u202e\n"


def test_the_same_arguments_give_the_same_bytes_in_batches(world, tmp_path, monkeypatch):
    monkeypatch.setattr("fastsae.report.neuronpedia.BATCH", 5)
    settings = {"latents": 12, "lens": False}
    first, second = (exported(world.sae, world.heldout, tmp_path / n, **settings) for n in "ab")
    files = sorted(path.name for path in first.iterdir())
    assert files == ["batch-0.json", "batch-1.json", "batch-2.json", "provenance.json"]
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in files)
    features = [one for name in files[:3] for one in read(first / name)["features"]]
    numbers = [one["feature_index"] for one in features]
    assert numbers == sorted({*numbers}) and len(numbers) == 12
    assert not any(one["pos_str"] or one["logits_hist_data_bar_values"] for one in features)
    with pytest.raises(ValueError, match=r"must be a new or empty directory, got .*/a/batches"):
        exported(world.sae, world.heldout, tmp_path / "a")


def test_a_failed_export_leaves_nothing_and_can_be_repeated(world, tmp_path):
    with pytest.raises(KeyError), new_folder(tmp_path / "other") as made:
        (made / "batch-0.json").touch()
        raise KeyError
    assert not any(tmp_path.iterdir())
    (tmp_path / "batches").mkdir()
    found = exported(world.sae, world.heldout, tmp_path, latents=3, lens=False)
    assert len([*found.iterdir()]) == len([*tmp_path.iterdir()]) == 2


def test_latents_that_are_never_active_are_left_out_and_counted(world, tmp_path):
    sae = copy.deepcopy(world.sae)
    with torch.no_grad():
        sae.b_enc[3] = -1000.0
    found = exported(sae, world.heldout, tmp_path, latents=4, include=(3,))
    numbers = [one["feature_index"] for one in read(found / "batch-0.json")["features"]]
    about = read(found / "provenance.json")
    assert 3 not in numbers and len(numbers) == about["latents"] == 4
    assert about["latents left out because they are never active"] == 1


def test_what_has_no_dashboards(world, tmp_path):
    with pytest.raises(ValueError, match="not crosscoders"):
        exported(SAE(WIDTH, 8, TopK(1), layers=2, by_norm=True), world.heldout, tmp_path)
    with pytest.raises(ValueError, match="whose text is known"):
        exported(world.sae, ActivationArray(torch.randn(9, WIDTH)), tmp_path)
    assert not any(tmp_path.iterdir())


def test_sae_dashboard_reads_them(batches):
    """Its classes take every entry, and write the same."""
    library = pytest.importorskip("sae_dashboard.neuronpedia.neuronpedia_dashboard")
    found = read(batches / "batch-0.json")
    assert library.NeuronpediaDashboardBatch(**found).to_dict() == found
