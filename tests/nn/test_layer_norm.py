"""An SAE that normalizes each token, against the definition of OpenAI's, written out below."""

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

import fastsae
from fastsae import SAE, TopK
from fastsae.losses import Objective, training_loss
from fastsae.nn import Activation, Init, init_from_data
from fastsae.nn.jumprelu import JumpReLU
from fastsae.nn.relu import ReLU
from fastsae.train.optim import Adam
from fastsae.train.step import autograd_step, fused_step

D_IN, D_SAE, K = 12, 40, 5
SIZES = (1, 2, 33)
ACTIVATIONS = [
    pytest.param(lambda: TopK(K), id="topk"),
    pytest.param(lambda: JumpReLU(threshold=0.3), id="jumprelu"),
    pytest.param(lambda: ReLU(l1_coef=0.0), id="relu"),
]


def normalized(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens less their mean, by their deviation; that deviation, and that mean."""
    mean = x.mean(-1, keepdim=True)
    deviation = x.std(-1, keepdim=True)
    return (x - mean) / (deviation + 1e-5), deviation, mean


def reference(sae: SAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output for x and its dense codes."""
    z, deviation, mean = normalized(x)
    h = linear(z - sae.b_dec, sae.W_enc, sae.b_enc)
    if isinstance(sae.activation, TopK):
        kept = torch.topk(h, K, dim=-1)
        codes = torch.zeros_like(h).scatter(-1, kept.indices, kept.values.relu())
    else:
        codes = h * (h > getattr(sae.activation, "threshold", 0.0))
    return (codes @ sae.W_dec + sae.b_dec) * deviation + mean, codes


def sae_of(activation: Activation, **settings: Any) -> SAE:
    """With weights of no special form, in float64."""
    sae = SAE(D_IN, D_SAE, activation, layer_norm=True, **settings).double()
    with torch.no_grad():
        for weight in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec):
            weight.add_(0.3 * torch.randn_like(weight))
    return sae


def tokens(n: int) -> Tensor:
    """Of means and deviations that differ."""
    scale = torch.linspace(0.2, 30, n).double()[:, None]
    return scale * torch.randn(n, D_IN).double() + scale.sqrt()


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("build", ACTIVATIONS)
def test_values_and_gradients(build, n):
    """With respect to the tokens too, through their means and deviations."""
    sae, x, weight = sae_of(build()), tokens(n).requires_grad_(), torch.randn(n, D_IN).double()
    expected, codes = reference(sae, x)
    torch.testing.assert_close(sae(x), expected)
    torch.testing.assert_close(sae.decode(sae.encode(x), x), expected)
    torch.testing.assert_close(sae.encode(x).to_dense(), codes)
    leaves = [x, sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec]
    got, wanted = (torch.autograd.grad((y * weight).sum(), leaves) for y in (sae(x), expected))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)
        assert other.any()


def test_no_tokens():
    sae, x = sae_of(TopK(K)), tokens(0)
    assert sae(x).shape == sae.decode(sae.encode(x), x).shape == (0, D_IN)


def test_leading_dimensions_are_kept():
    sae, x = sae_of(TopK(K)), tokens(6)
    assert torch.equal(sae(x.view(2, 3, D_IN)), sae(x).view(2, 3, D_IN))


def test_a_token_without_deviation_comes_out_as_it_is():
    sae, x = sae_of(TopK(K)), torch.full((1, D_IN), 7.0).double().requires_grad_()
    torch.testing.assert_close(sae(x), x)
    (gradient,) = torch.autograd.grad(sae(x).sum(), x)
    assert gradient.isfinite().all()


def without(sae: SAE) -> SAE:
    """The same weights for tokens that are normalized already."""
    inner = copy.deepcopy(sae)
    inner.layer_norm = False
    return inner


@pytest.mark.parametrize("build", ACTIVATIONS)
def test_the_loss_is_that_of_normalised_tokens(build):
    sae, x, dead = sae_of(build()), tokens(50), torch.arange(0, D_SAE, 3)
    z, *_ = normalized(x)
    one, other = training_loss(sae, x, dead), training_loss(without(sae), z, dead)
    torch.testing.assert_close(one.loss, other.loss)
    torch.testing.assert_close(one.fvu, other.fvu)
    torch.testing.assert_close(one.codes.to_dense(), other.codes.to_dense())


@pytest.mark.parametrize("take", [autograd_step, fused_step])
def test_steps_are_those_on_normalised_tokens(take):
    first, dead = sae_of(TopK(K)), torch.arange(0, D_SAE, 3)
    trained = []
    for sae in (copy.deepcopy(first), without(first)):
        torch.manual_seed(1)
        adam = Adam(sae)
        for _ in range(5):
            x = tokens(50) if sae.layer_norm else normalized(tokens(50))[0]
            adam.begin_step(1e-2)
            take(sae, adam, x, dead, Objective())
        trained.append(sae.state_dict())
    for name, weight in first.state_dict().items():
        torch.testing.assert_close(trained[0][name], trained[1][name])
        assert not torch.equal(trained[0][name], weight)


def test_a_start_from_normalised_tokens():
    x, init = tokens(200), Init(start_l0=3.0, rows="active_subspace")
    sae = sae_of(JumpReLU())
    saes = sae, without(sae)
    for one, seen in zip(saes, (x, normalized(x)[0]), strict=True):
        init_from_data(one, seen, torch.Generator().manual_seed(1), init=init)
    for name, weight in saes[1].state_dict().items():
        torch.testing.assert_close(saes[0].state_dict()[name], weight)


def test_a_scale_changes_nothing_but_by_the_1e_5():
    """Which is that part of a deviation at most: the codes of a ReLU move by as much of the largest
    pre-activation that is without b_enc, the output by that much of its part from them."""
    sae, x, scale = sae_of(ReLU(l1_coef=0.0)), tokens(50), 0.25
    z, deviation, _ = normalized(x)
    before = copy.deepcopy(sae)
    assert sae.fold_scale_(scale) is sae
    part = 1e-5 / (scale * deviation)
    moved = part * (z @ sae.W_enc.T).abs()
    change = (sae.encode(x).to_dense() - before.encode(scale * x).to_dense()).abs()
    assert (change <= moved).all() and change.any()
    allowed = deviation * (moved @ sae.W_dec.abs()) + 1e-12
    assert ((sae(x) - before(scale * x) / scale).abs() <= allowed).all()


def test_saved_and_loaded(tmp_path):
    sae, x = sae_of(TopK(K), by_norm=True), tokens(9)
    sae.save(tmp_path)
    again = fastsae.load(tmp_path)
    assert again.shape() == sae.shape() and again.layer_norm
    assert torch.equal(again(x), sae(x))
    assert "by_norm=True, layer_norm=True" in repr(again)


def test_older_files_do_not_name_it(tmp_path):
    sae = SAE(D_IN, D_SAE, TopK(K))
    sae.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("layer_norm", "version", "crc32"):
        del config[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert fastsae.load(tmp_path).shape() == sae.shape()


def test_what_has_no_layer_norm():
    for layers in (1, 3):
        with pytest.raises(ValueError, match="layer_norm needs a width of at least 2, got 1"):
            SAE(layers, D_SAE, TopK(K), layers=layers, layer_norm=True)
    sae = sae_of(TopK(K))
    with pytest.raises(ValueError, match="an SAE with layer_norm decodes codes together with"):
        sae.decode(sae.encode(tokens(3)))
    with pytest.raises(ValueError, match="cannot take on factors of single columns"):
        sae.fold_columns_(torch.ones(D_IN))
    with pytest.raises(ValueError, match="cannot take on a mean of its inputs"):
        sae.fold_mean_(torch.ones(D_IN))
