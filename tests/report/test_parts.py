"""The parts of a report that are numbers: which latents have a card, frequencies, directions, the
logit lens, verdicts."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import layer_norm, normalize

from fastsae.config import to_dict
from fastsae.data import ActivationArray
from fastsae.evals import CausalEffect, EvalConfig, evaluate, reconstruction
from fastsae.nn import SAE, AbsTopK, TopK
from fastsae.report.bars import bars
from fastsae.report.config import ReportConfig
from fastsae.report.contexts import number
from fastsae.report.firings import collect
from fastsae.report.frequencies import choose, frequencies
from fastsae.report.geometry import (
    encoder_decoder_cosines,
    has_umap,
    latent_map,
    neighbors,
    pca,
    umap,
)
from fastsae.report.lens import NoLens, logit_lens
from fastsae.report.verdicts import verdicts
from fastsae.train.run_folder import weights_digest

from .conftest import WIDTH


def test_cards_are_of_all_frequencies():
    counts = torch.randperm(5000).numpy() * (np.arange(5000) % 5 > 0)
    config = ReportConfig(latents=64, include=(0, 5))
    chosen = choose(counts, config).tolist()
    assert chosen == sorted(set(chosen)) and {0, 5} <= set(chosen)
    drawn = sorted(set(chosen) - {0, 5}, key=lambda i: -counts[i])
    assert 62 <= len(drawn) <= 64 and all(counts[drawn])
    ranks = {latent: rank for rank, latent in enumerate(np.argsort(-counts, kind="stable"))}
    alive = (counts > 0).sum()
    if len(drawn) == 64:
        assert all(
            int(part * alive / 64) <= ranks[i] + 1 <= (part + 2) * alive / 64
            for part, i in enumerate(drawn)
        )
    assert choose(counts, config).tolist() == chosen
    assert choose(counts, replace(config, seed=1)).tolist() != chosen
    assert choose(np.array([3, 0, 9]), ReportConfig()).tolist() == [0, 2]
    assert choose(np.zeros(4, int), ReportConfig()).tolist() == []


def test_every_latent_is_counted_once():
    x = torch.randn(500, 8)
    sae = SAE(8, 200, TopK(2)).eval()
    with torch.no_grad():
        sae.b_enc[:3] = 100.0  # always among the two, or next to always
        sae.b_enc[-90:] = -100.0
    found = collect(sae, ActivationArray(x), ReportConfig(), progress=False)
    shown = frequencies(found)
    assert sum(shown["counts"]) + shown["dead"]["count"] == 200
    assert set(range(110, 200)) <= set(shown["dead"]["ids"])
    dense = np.flatnonzero(found.counts > 50)
    assert sorted(shown["dense"]["ids"]) == dense.tolist()
    assert shown["dense"]["counts"] == sorted(shown["dense"]["counts"], reverse=True)


@pytest.mark.parametrize("activation", [TopK(2), AbsTopK(2)])
def test_neighbors_have_the_largest_cosines(activation):
    sae = SAE(8, 50, activation)
    cosines = normalize(sae.W_dec.detach(), dim=1) @ normalize(sae.W_dec.detach(), dim=1).T
    cosines.fill_diagonal_(0)
    size = cosines.abs() if activation.signed else cosines
    for latent, near in zip([3, 49], neighbors(sae, torch.tensor([3, 49])), strict=True):
        assert [i for i, _ in near] == size[latent].topk(len(near)).indices.tolist()
        assert [c for _, c in near] == [number(float(cosines[latent, i])) for i, _ in near]
    assert neighbors(SAE(8, 1, TopK(1)), torch.tensor([0])) == [[]]


def test_encoder_and_decoder_rows_are_compared_in_one_space():
    sae = SAE(8, 20, TopK(2))
    found = encoder_decoder_cosines(sae, torch.tensor([1, 4]))
    assert found is not None
    np.testing.assert_allclose(found, [1.0, 1.0], rtol=1e-5)
    assert encoder_decoder_cosines(SAE(8, 20, TopK(2), d_out=8), torch.tensor([1])) is None


def test_a_map_has_the_cards_and_other_active_latents(monkeypatch):
    monkeypatch.setattr("fastsae.report.geometry.MOST_POINTS", 30)
    counts = np.arange(100) % 3
    found = latent_map(SAE(8, 100, TopK(2)), counts, torch.tensor([0, 9, 99]), "pca", 0)
    assert len(found["ids"]) == 30 and {0, 9, 99} <= set(found["ids"])
    assert all(counts[i] for i in found["ids"] if i not in (0, 9, 99))
    assert found["counts"] == counts[found["ids"]].tolist()
    for axis in ("x", "y"):
        assert (min(found[axis]), max(found[axis])) == (0, found["grid"])


def test_pca_finds_the_plane_of_the_data():
    plane = torch.randn(200, 2) * torch.tensor([3.0, 1.0])
    axes, _ = torch.linalg.qr(torch.randn(7, 7))
    flat, about = pca(plane @ axes[:2])
    again = torch.from_numpy(flat)
    wanted = torch.cdist(plane.double(), plane.double())
    np.testing.assert_allclose(torch.cdist(again, again), wanted, atol=1e-4)
    assert "100%" in about
    assert pca(torch.ones(3, 1))[0].shape == (3, 2)


def test_a_map_by_umap():
    if not has_umap():
        with pytest.raises(ValueError, match="needs umap-learn"):
            umap(torch.randn(20, 4), 0)
        pytest.skip("umap-learn is not installed")
    rows = torch.randn(2, 1, 8) + 0.1 * torch.randn(2, 30, 8)  # two clusters
    flat, again = (umap(rows.flatten(0, 1), 0)[0].reshape(2, 30, 2) for _ in range(2))
    np.testing.assert_array_equal(flat, again)
    within = flat.std(1).max()
    assert np.linalg.norm(flat[0].mean(0) - flat[1].mean(0)) > 2 * within
    with pytest.raises(ValueError, match="at least 16"):
        umap(torch.randn(9, 4), 0)


@pytest.fixture(scope="module")
def lens(world):
    return logit_lens(world.sae, torch.tensor([0, 7]), world.heldout, False, histograms=True)


def test_no_latent_is_active():
    sae, counts = SAE(WIDTH, 8, TopK(1)), np.zeros(8, np.int64)
    found = latent_map(sae, counts, torch.tensor([], dtype=torch.int64), "auto", 0)
    assert found["about"] == "No latent is active" and found["ids"] == found["x"] == []


def test_the_lens_is_the_last_norm_and_the_unembedding(lens, world):
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(world.model)
    with torch.no_grad():
        gain = model.transformer.ln_f.weight
        logits = layer_norm(world.sae.W_dec[:8], (WIDTH,), gain) @ model.lm_head.weight.T
    for found, own in zip(lens, logits[[0, 7]] - logits[[0, 7]].mean(1, keepdim=True), strict=True):
        order = own.sort(descending=True)
        for side, ids, values in (
            (found.promoted, order.indices[:10], order.values[:10]),
            (found.suppressed, order.indices.flip(0)[:10], order.values.flip(0)[:10]),
        ):
            assert [token for token, _ in side] == ids.tolist()
            np.testing.assert_allclose([v for _, v in side], values, rtol=1e-5)
        assert found.histogram.heights == torch.histc(own, 50).int().tolist()
        assert found.deviation == pytest.approx(float(own.std(correction=0)), rel=1e-5)
    with torch.no_grad():
        random = torch.randn(256, WIDTH, generator=torch.Generator().manual_seed(0))
        logits = layer_norm(random, (WIDTH,), gain) @ model.lm_head.weight.T
        logits -= logits.mean(1, keepdim=True)
        furthest = logits.abs().amax(1) / logits.std(1, correction=0)
    for found in lens:
        assert found.level == pytest.approx(float(furthest.quantile(0.95)), rel=1e-5)


def test_a_histogram_of_neighboring_floats():
    found = bars(np.array([5.0, 5.0000005, 5.0000005], np.float32))
    assert (found.heights[0], found.heights[-1], sum(found.heights)) == (1, 2, 3)
    assert found.middles == sorted({*found.middles})
    assert not bars(np.array([], np.float32)).heights


def test_where_there_is_no_lens(world, monkeypatch):
    def why(sae, data):
        with pytest.raises(NoLens) as error:
            logit_lens(sae, torch.tensor([0]), data, False)
        return str(error.value)

    assert not logit_lens(world.sae, torch.tensor([0]), world.heldout, False)[0].histogram.heights
    plain = ActivationArray(torch.randn(9, WIDTH))
    assert "names no model" in why(world.sae, plain)
    assert "width" in why(SAE(WIDTH, 8, TopK(1), d_out=5), world.heldout)
    assert "crosscoder" in why(SAE(WIDTH, 8, TopK(1), layers=2, by_norm=True), world.heldout)
    endless = copy.deepcopy(world.sae)
    with torch.no_grad():
        endless.W_dec[0] = torch.inf
    assert "not all finite" in why(endless, world.heldout)
    gone = ActivationArray(torch.randn(9, WIDTH), model="/no/such/model")
    assert "cannot load" in why(world.sae, gone)
    monkeypatch.setattr("fastsae.report.lens.available_memory", lambda: 1000)
    assert "bytes, more than are available" in why(world.sae, world.heldout)


def test_an_evaluation_counts_for_its_own_sae(world, tmp_path):
    sae, data = world.sae, world.heldout
    found = reconstruction(sae, data)

    def recovered():
        return verdicts(sae, found, tmp_path)[-1]

    assert (recovered().value, recovered().grade) == ("not measured", "none")
    assert f"fastsae eval {tmp_path.name}" in recovered().about
    result = evaluate(sae, data, EvalConfig(windows=4), progress=False)
    effect = result.downstream
    assert isinstance(effect, CausalEffect) and effect.recovered_zero is not None
    written = to_dict(result) | {"sae": weights_digest(sae)}
    (tmp_path / "eval.json").write_text(json.dumps(written))
    assert recovered().value == f"{effect.recovered_zero:.1%}"
    change = f"{effect.ce_clean:.3f} → {effect.ce:.3f} ({effect.ce - effect.ce_clean:+.3f} nats"
    assert f"Loss {change}" in recovered().about
    assert f"zero ablation {effect.ce_zero:.3f}, mean" in recovered().about
    (tmp_path / "eval.json").write_text(json.dumps(written | {"sae": "0" * 32}))
    assert "another SAE" in recovered().about
    (tmp_path / "eval.json").write_text("[]")
    assert recovered().grade == "none" and "eval.json" in recovered().about
    fvu, l0, *_ = verdicts(sae, found, None)
    assert fvu.value == f"{found.fvu:.4f}"
    assert l0.good.startswith("Good from 10 to 100, poor above 300.")
