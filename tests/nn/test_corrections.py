"""Corrections of active latents' values: what they are, what they leave alone, who refuses them."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import functional_call

from fastsae import SAE, TopK
from fastsae.interop.inference_rule import rule_of
from fastsae.losses import training_loss
from fastsae.nn import Init, TopKConfig, init_from_data
from fastsae.train import TrainConfig
from fastsae_kernels import By

D, F, K = 12, 40, 6


def sae_of(by: By, corrections: int) -> tuple[SAE, Tensor]:
    """One in evaluation mode, with weights of no special form, and tokens."""
    torch.manual_seed(0)
    sae = SAE(D, F, TopK(K, by=by, corrections=corrections)).double().eval()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return sae, torch.randn(7, D).double() + 0.5


def errors(sae: SAE, x: Tensor) -> Tensor:
    return (x - sae(x)).square().sum(1).detach()


@pytest.mark.parametrize("by", ["value", "abs"])
def test_the_formula(by):
    (plain, x), (sae, _) = sae_of(by, 0), sae_of(by, 3)
    z = plain.encode(x).to_dense()
    active = z != 0
    for _ in range(3):
        g = (x - sae.b_dec - z @ sae.W_dec) @ sae.W_dec.T * active
        room = torch.tensor(torch.inf)
        if by == "value":
            g = torch.where((z > 0) | (g > 0), g, 0)
            room = torch.where(g < 0, z / -g, torch.inf).amin(1, keepdim=True)
        length = g.square().sum(1, True) / (g @ sae.W_dec).square().sum(1, True)
        z = z + length.minimum(room) * g
        z = z.where(z.abs() > 1e-12, 0)
    torch.testing.assert_close(sae.encode(x).to_dense(), z)
    assert not ((z != 0) & ~active).any()


@pytest.mark.parametrize("by", ["value", "abs"])
def test_every_gradient(by):
    sae, x = sae_of(by, 2)
    names, parameters = zip(*sae.named_parameters(), strict=True)

    def recon(x: Tensor, *parameters: Tensor) -> Tensor:
        return functional_call(sae, dict(zip(names, parameters, strict=True)), (x,))

    assert gradcheck(recon, (x[:3].requires_grad_(), *parameters), fast_mode=True)


@pytest.mark.parametrize("corrections", [1, 2, 5])
def test_none_raises_an_error(corrections):
    """Also of latents whose decoder rows are nearly the same, among which errors are flat."""
    torch.manual_seed(0)
    rows = torch.randn(32, D)
    sae = SAE(D, 64, TopK(4, corrections=corrections)).double().eval()
    with torch.no_grad():
        near = torch.cat([rows, rows + 0.01 * torch.randn(32, D)]).double()
        sae.W_dec.copy_(torch.nn.functional.normalize(near, dim=1))
        sae.W_enc.copy_(sae.W_dec)
    x = torch.randn(500, D).double()
    after = errors(sae, x)
    sae.activation = TopKConfig(k=4).build()
    assert (after <= errors(sae, x) * (1 + 1e-9)).all()


def test_many_lead_to_the_least_squares_values():
    found = [errors(*sae_of("abs", n)) for n in (0, 1, 2, 8)]
    for more, fewer in zip(found[1:], found, strict=False):
        assert (more < fewer).all()
    sae, x = sae_of("abs", 300)
    rows = sae.W_dec[sae.encode(x).latents()].mT
    values = torch.linalg.lstsq(rows, (x - sae.b_dec)[:, :, None]).solution
    least = (x - sae.b_dec - (rows @ values)[:, :, 0]).square().sum(1)
    torch.testing.assert_close(errors(sae, x), least.detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """Of activations whose squared norm float16 does not have."""
    x = 200 * torch.randn(64, D)
    found = []
    for n in (0, 2):
        sae = sae_of("abs", n)[0].to(dtype)
        found.append(float((x - sae(x).detach().float()).square().sum()))
    assert found[1] < 0.9 * found[0]


@pytest.mark.parametrize("by", ["value", "abs"])
def test_nothing_to_correct(by):
    """No tokens, and tokens that are reconstructed without an error."""
    sae, x = sae_of(by, 2)
    assert sae(x[:0]).shape == (0, D)
    with torch.no_grad():
        sae.W_dec.zero_()
        sae.b_dec.copy_(x[0])
    x = x[:1].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(sae.encode(x).values.sum(), x)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("by", ["value", "abs"])
def test_training_is_without(by):
    trained = []
    for n in (0, 2):
        sae, x = sae_of(by, n)
        init_from_data(sae, x, init=Init(encoder="fitted"))
        loss = training_loss(sae.train(), x).loss
        loss.backward()
        trained.append([loss, sae.W_enc, *(p.grad for p in sae.parameters())])
    for plain, corrected in zip(*trained, strict=True):
        assert torch.equal(plain, corrected)
    assert TrainConfig(activation=TopKConfig(by=by, corrections=2)).not_fused is None


def test_what_others_cannot_hold():
    with pytest.raises(ValueError, match="no other library's format supports topk with corr"):
        rule_of(sae_of("value", 1)[0])
    with pytest.raises(ValueError, match="corrections=1.* cannot take on factors of single"):
        sae_of("value", 1)[0].fold_columns_(torch.ones(D))
