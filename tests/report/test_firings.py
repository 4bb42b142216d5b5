"""What is kept of the codes is all that is active, by latent."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastsae.data import ActivationArray
from fastsae.evals import reconstruction
from fastsae.report.config import ReportConfig
from fastsae.report.firings import collect, most_tokens, spread

from .kinds import D_IN, D_SAE, build


@pytest.mark.parametrize(
    "name", ["topk", "abstopk", "relu", "jumprelu", "rational of every latent"]
)
def test_entries_are_those_of_the_dense_codes(name, monkeypatch):
    sae = build(name)
    data = ActivationArray(torch.randn(300, D_IN))
    found = collect(sae, data, ReportConfig(batch_size=70), progress=False)
    dense = sae.encode(data.rows(found.rows)).to_dense().detach().numpy()
    again = np.zeros_like(dense)
    for latent in range(D_SAE):
        places, values = found.of(latent)
        assert (np.diff(places) > 0).all()
        again[places, latent] = values
    np.testing.assert_allclose(again, dense, rtol=1e-6)
    np.testing.assert_array_equal(found.counts, (dense != 0).sum(0))
    whole = reconstruction(sae, data)
    assert found.found.fvu == pytest.approx(whole.fvu, rel=1e-12)
    assert (found.found.l0, found.found.dead_fraction) == (whole.l0, whole.dead_fraction)


def test_tokens_of_extreme_norm_are_left_out():
    x = torch.randn(300, D_IN)
    x[7] *= 1000
    sae = build("topk")
    found = collect(sae, ActivationArray(x), ReportConfig(), progress=False)
    assert 7 not in found.places and found.found.left_out == 1
    kept = collect(sae, ActivationArray(x), ReportConfig(max_norm_ratio=None), progress=False)
    assert 7 in kept.places


def test_so_many_active_latents_take_fewer_tokens(monkeypatch):
    monkeypatch.setattr("fastsae.report.firings.MOST_ENTRIES", 4000)
    data = ActivationArray(torch.randn(900, D_IN))
    for name, most in {"topk": 900, "rational of every latent": 4000 // D_SAE}.items():
        sae = build(name)
        found = collect(sae, data, ReportConfig(), progress=False)
        assert len(found.rows) <= most_tokens(sae, data, ReportConfig())
        assert len(found.values) <= 4000 and len(found.rows) >= most * 0.9


@given(st.integers(1, 5000), st.integers(1, 3000), st.integers(1, 64))
def test_blocks_are_spread_over_all_rows(n, most, block):
    rows = spread(n, most, block).tolist()
    assert rows == sorted(set(rows)) and rows[0] >= 0 and rows[-1] < n
    if n <= most:
        assert rows == list(range(n))
    else:
        assert most - block < len(rows) <= most
        assert n - rows[-1] <= n / (most // min(block, most)) + 1
