"""Reconstruction: each number against its formula on dense float64 arrays, and known limits."""

import json

import numpy as np
import pytest
import torch

from fastsae.codes import Codes
from fastsae.config import to_dict
from fastsae.data import ActivationShards, Synthetic
from fastsae.evals import reconstruction
from fastsae.nn import SAE, AbsTopK, TopK

from .conftest import identity

D = 24


@pytest.fixture
def x() -> np.ndarray:
    """Correlated rows, far from the origin as activations are."""
    generator = np.random.default_rng(0)
    mix = generator.normal(size=(D, D)) * np.geomspace(3, 0.1, D)[:, None]
    return (generator.normal(size=(1000, D)) @ mix + 20).astype(np.float32)


@pytest.fixture
def data(x, tmp_path) -> ActivationShards:
    np.save(tmp_path / "x.npy", x)
    return ActivationShards(tmp_path / "x.npy")


def expected(sae: SAE, x: np.ndarray, ranks: list[int]) -> dict:
    """The definitions, one line each."""
    with torch.no_grad():
        codes = sae.encode(torch.from_numpy(x))
        z, recon = codes.to_dense().double().numpy(), sae.decode(codes).double().numpy()
    x = x.astype(np.float64)
    size = np.linalg.norm(x, axis=1), np.linalg.norm(recon, axis=1)
    variance, u = np.linalg.eigh(np.cov(x.T, bias=True))
    order = np.argsort(-variance)
    share = (z != 0).sum(0) / (z != 0).sum()
    kept = np.maximum(0, 1 - np.var((x - recon) @ u, axis=0) / np.var(x @ u, axis=0))[order]
    return {
        "tokens": len(x),
        "left_out": 0,
        "fvu": ((x - recon) ** 2).sum() / ((x - x.mean(0)) ** 2).sum(),
        "fvu_all": ((x - recon) ** 2).sum() / ((x - x.mean(0)) ** 2).sum(),
        "mse": ((x - recon) ** 2).mean(),
        "l0": (z != 0).sum(1).mean(),
        "dead_fraction": ((z != 0).sum(0) == 0).mean(),
        "dense_fraction": ((z != 0).mean(0) > 0.1).mean(),
        "utilization": np.exp(-(share[share > 0] * np.log(share[share > 0])).sum()) / z.shape[1],
        "cosine": ((x * recon).sum(1) / (size[0] * size[1])).mean(),
        "relative_norm": (size[1] / size[0]).mean(),
        "pc_retention": {str(r): kept[:r].mean() for r in ranks},
    }


@pytest.mark.parametrize("activation", [TopK(4), AbsTopK(4)])
@pytest.mark.parametrize("batch_size", [1, 300, 4096])
def test_matches_the_definitions(activation, batch_size, x, data):
    sae, tokens = SAE(D, 70, activation), min(len(x), 100 * batch_size)
    found = to_dict(
        reconstruction(sae, data, max_tokens=tokens, batch_size=batch_size, pc_ranks=[1, 5, D])
    )
    wanted = expected(sae, x[:tokens], [1, 5, D])
    assert found.keys() == wanted.keys()
    for name in wanted:  # the sae runs in float32, where the batch size changes the rounding
        assert found[name] == pytest.approx(wanted[name], rel=1e-5, abs=1e-7), name
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("batch_size", [1, 300])
def test_tokens_of_extreme_norm_only_count_in_the_fvu_of_all(batch_size, x, tmp_path):
    """Whole batches of them too."""
    extreme = np.isin(np.arange(len(x)), [0, 1, 400, 999])
    x = np.where(extreme[:, None], 1000 * x[:, ::-1], x)
    np.save(tmp_path / "x.npy", x)
    sae, data = SAE(D, 70, TopK(4)), ActivationShards(tmp_path / "x.npy")
    found = to_dict(reconstruction(sae, data, batch_size=batch_size, pc_ranks=[5]))
    wanted = expected(sae, x[~extreme], [5])
    wanted |= {"left_out": 4, "fvu_all": expected(sae, x, [5])["fvu"]}
    for name in wanted:
        assert found[name] == pytest.approx(wanted[name], rel=1e-5, abs=1e-7), name
    every = reconstruction(sae, data, pc_ranks=[5], max_norm_ratio=None)
    assert every.left_out == 0 and every.fvu == pytest.approx(wanted["fvu_all"], rel=1e-5)


def test_signed_codes_count_as_active(data):
    sae = identity(D)
    with torch.no_grad():
        sae.W_enc.neg_()  # the data is positive: every code is negative
        sae.W_dec.neg_()
    found = reconstruction(sae, data)
    assert (found.l0, found.dead_fraction, found.dense_fraction) == (D, 0, 1)


def test_perfect_reconstruction(data):
    found = reconstruction(identity(D), data)
    assert (found.fvu, found.mse, found.relative_norm) == (0, 0, 1)
    assert found.cosine == pytest.approx(1, abs=1e-12)
    assert found.pc_retention == {"12": 1, "16": 1, "24": 1}  # d_in / 2, 16, and 64 cut to d_in


def test_zero_reconstruction(x, data):
    sae = identity(D)
    with torch.no_grad():
        sae.W_dec.zero_()
    found = reconstruction(sae, data, pc_ranks=[4])
    assert found.pc_retention["4"] == pytest.approx(0, abs=1e-10)
    assert found.mse == pytest.approx(float((x.astype(np.float64) ** 2).mean()))
    assert (found.cosine, found.relative_norm) == (0, 0)


def test_codes_that_list_every_latent(data, monkeypatch):
    sae = SAE(D, 70, TopK(4))
    few, encode = to_dict(reconstruction(sae, data)), sae.encode
    monkeypatch.setattr(sae, "encode", lambda x: Codes.every(encode(x).to_dense()))
    every = to_dict(reconstruction(sae, data))
    assert every.keys() == few.keys()
    for name in few:
        assert every[name] == pytest.approx(few[name], rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize(("biases", "utilization"), [((), 0), ((9.0,), 1 / 8), ((9.0, 9.0), 2 / 8)])
def test_utilization_counts_latents_that_fire_equally_often(biases, utilization, data):
    sae = SAE(D, 8, TopK(max(len(biases), 1)))
    with torch.no_grad():
        sae.W_enc.zero_()
        sae.b_enc[: len(biases)] = torch.tensor(biases)
    assert reconstruction(sae, data).utilization == pytest.approx(utilization, abs=1e-12)


def test_the_mode_is_that_of_evaluation_meanwhile(data, monkeypatch):
    sae = SAE(D, 70, TopK(4))
    modes, encode = [], sae.encode
    monkeypatch.setattr(sae, "encode", lambda x: modes.append(sae.training) or encode(x))
    for training in (True, False):
        reconstruction(sae.train(training), data, max_tokens=10)
        assert sae.training == training
    assert modes == [False, False]


def test_first_tokens_only(x, data):
    sae = SAE(D, 70, TopK(4))
    found = reconstruction(sae, data, max_tokens=101, batch_size=50, pc_ranks=[3], progress=True)
    wanted = expected(sae, x[:101], [3])
    assert found.tokens == 101
    assert found.fvu == pytest.approx(wanted["fvu"], rel=1e-5)
    assert found.pc_retention == pytest.approx(wanted["pc_retention"], rel=1e-5)
    assert reconstruction(sae, data, max_tokens=10**9).tokens == len(x)


def test_directions_without_variance_are_left_out(tmp_path):
    """Six rows span five directions: rank 16 is the mean over those five."""
    x = np.random.default_rng(1).normal(size=(6, D)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    sae = SAE(D, 70, TopK(4))
    found = reconstruction(sae, ActivationShards(tmp_path / "x.npy"), pc_ranks=[16])
    assert found.pc_retention["16"] == pytest.approx(
        expected(sae, x, [5])["pc_retention"]["5"], rel=1e-5
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sae": SAE(D + 1, 70, TopK(4))}, "d_in = 25, the data has rows of 24"),
        ({"sae": SAE(D, 70, TopK(4), d_out=3)}, "d_in = 24 and d_out = 3, the data has rows of 24"),
        ({"max_tokens": 0}, "at least 1"),
        ({"batch_size": 0}, "at least 1"),
        ({"pc_ranks": [0]}, "at least 1"),
        ({"max_tokens": 1}, "all the same"),
    ],
)
def test_bad_input(change, message, data):
    arguments = {"sae": SAE(D, 70, TopK(4)), "data": data, **change}
    with pytest.raises(ValueError, match=message):
        reconstruction(**arguments)


def test_rows_that_are_not_numbers_are_named(x, tmp_path):
    x[7, 3] = np.nan
    np.save(tmp_path / "bad.npy", x)
    with pytest.raises(ValueError, match="bad.npy row 7"):
        reconstruction(SAE(D, 70, TopK(4)), ActivationShards(tmp_path / "bad.npy"), batch_size=5)


def test_equal_rows_have_no_variance(tmp_path):
    np.save(tmp_path / "x.npy", np.full((7, D), 0.3, np.float32))
    with pytest.raises(ValueError, match="all the same"):
        reconstruction(SAE(D, 70, TopK(4)), ActivationShards(tmp_path / "x.npy"), batch_size=3)


def test_synthetic_data():
    """The dictionary that rows were made of, with a token's own latents active, explains them."""
    data = Synthetic(d_in=D, n_latents=8, active=1, n_tokens=2000)
    sae = SAE(D, 8, TopK(1))
    with torch.no_grad():
        sae.W_enc.copy_(data.dictionary)
        sae.W_dec.copy_(data.dictionary)
    found = reconstruction(sae, data)
    assert (found.l0, found.dead_fraction) == (1, 0)
    assert found.fvu == pytest.approx(0, abs=1e-6)
