"""Whatever the architecture: saved and loaded it is the same, and a data scale can be folded in."""

import pytest
import torch
from torch import Tensor

import fastsae
from fastsae import SAE
from fastsae.losses import training_loss
from fastsae.nn import TopKConfig
from fastsae.nn.variational import Variational

from .architectures import (
    ARCHITECTURES,
    D_IN,
    JUMPRELU,
    LEARNED,
    RELU,
    TOPK,
    TRANSCODER,
    Architecture,
    K,
)

SCALE, OUT = 0.25, 3.0
BY_NORM_TRANSCODER = {**TRANSCODER, "by_norm": True}
ALL = {
    **ARCHITECTURES,
    "transcoder by norm": Architecture(TOPK, options=BY_NORM_TRANSCODER),
    "jumprelu transcoder by norm": Architecture(JUMPRELU, options=BY_NORM_TRANSCODER),
    "jumprelu crosscoder": Architecture(JUMPRELU, options=ARCHITECTURES["crosscoder"].options),
    "corrected abstopk": Architecture(TopKConfig(k=K, by="abs", corrections=2)),
    "relu transcoder": Architecture(RELU, options=TRANSCODER),
}
SCALED = {name: a.options for name, a in ALL.items() if "layer_norm" not in a.options}
"""Those that do not normalize each token themselves."""


def trained(name: str) -> tuple[SAE, Tensor]:
    """An SAE in evaluation mode after a look at a batch, with weights of no special form."""
    sae, x = ALL[name].build(), torch.randn(50, D_IN) + 0.5
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    target = None if sae.d_out is None else torch.randn(50, sae.d_out)
    training_loss(sae, x, target=target)
    return sae.eval(), x


@pytest.mark.parametrize("name", ALL)
def test_a_loaded_one_is_the_same(name, tmp_path):
    sae, x = trained(name)
    sae.save(tmp_path)
    again = fastsae.load(tmp_path)
    assert again.activation.cfg == sae.activation.cfg
    assert again.shape() == sae.shape()
    assert torch.equal(again(x), sae(x))
    assert torch.equal(again.encode(x).to_dense(), sae.encode(x).to_dense())
    assert again.state_dict().keys() == sae.state_dict().keys()


@pytest.mark.parametrize(
    "name", [name for name, options in SCALED.items() if "layers" not in options]
)
def test_a_folded_scale(name):
    sae, x = trained(name)
    sae, x = sae.double(), x.double()
    out = SCALE if sae.d_out is None else OUT
    recon, codes = sae(SCALE * x) / out, sae.encode(SCALE * x).to_dense()
    sae.fold_scale_(SCALE, out)
    torch.testing.assert_close(sae(x), recon)
    got = sae.encode(x).to_dense()
    assert torch.equal(got != 0, codes != 0), "the same latents must be active"
    torch.testing.assert_close(got, codes / SCALE)


@pytest.mark.parametrize("name", [name for name, options in SCALED.items() if "layers" in options])
def test_folded_scales_of_layers(name):
    sae, x = trained(name)
    sae, x = sae.double(), x.double()
    factors = torch.tensor([SCALE, OUT]).double().repeat_interleave(D_IN // 2)
    recon, codes = sae(factors * x) / factors, sae.encode(factors * x).to_dense()
    sae.fold_columns_(factors)
    torch.testing.assert_close(sae.encode(x).to_dense(), codes)
    torch.testing.assert_close(sae(x), recon)


def test_a_folded_scale_of_normalized_inputs_is_that_of_the_target():
    sae, x = trained("layer norm skip transcoder")
    recon, codes = sae.double()(x.double()) / OUT, sae.encode(x.double()).to_dense()
    sae.fold_scale_(SCALE, OUT)
    torch.testing.assert_close(sae(x.double()), recon)
    assert torch.equal(sae.encode(x.double()).to_dense(), codes)


@pytest.mark.parametrize("name", SCALED)
def test_a_folded_mean(name):
    sae, x = trained(name)
    sae, x = sae.double(), x.double()
    mean, out = torch.full((D_IN,), SCALE).double(), OUT if sae.d_out else SCALE
    recon, codes = sae(x - mean) + out, sae.encode(x - mean).to_dense()
    sae.fold_mean_(mean, None if sae.d_out is None else torch.full((sae.d_out,), OUT))
    torch.testing.assert_close(sae.encode(x).to_dense(), codes)
    torch.testing.assert_close(sae(x), recon)


def test_a_folded_scale_leaves_the_noise_of_a_learned_variance():
    """Relative to the prior, which stays that of the data that it was trained on."""
    sae, x = trained("vsae of learned variance")
    activation = sae.double().activation
    assert isinstance(activation, Variational)

    def log_variance(x: Tensor) -> Tensor:
        return sae.center(x) @ activation.W_variance.T + activation.b_variance

    expected = log_variance(SCALE * x.double())
    sae.fold_scale_(SCALE)
    torch.testing.assert_close(log_variance(x.double()), expected)


def test_a_folded_mean_leaves_the_noise_of_a_transcoder():
    activation = LEARNED.build()
    assert isinstance(activation, Variational)
    sae, x = SAE(D_IN, 64, activation, d_out=D_IN).double(), torch.randn(9, D_IN).double()
    activation.W_variance.data.normal_()
    expected = (x - SCALE) @ activation.W_variance.T + activation.b_variance
    sae.fold_mean_(torch.full((D_IN,), SCALE).double())
    torch.testing.assert_close(x @ activation.W_variance.T + activation.b_variance, expected)
