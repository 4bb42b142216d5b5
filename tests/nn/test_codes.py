import pytest
import torch

from fastsae import SAE, BatchTopK, JumpReLU, ReLU
from fastsae.codes import Codes

N, D_SAE, D_OUT = 5, 7, 3


def dense_values() -> torch.Tensor:
    """Codes of both signs, of which a latent and a token are never active."""
    values = torch.randn(N, D_SAE).double()
    values[torch.rand(N, D_SAE) < 0.4] = 0.0
    values[:, 2], values[3] = 0.0, 0.0
    return values


def listed(values: torch.Tensor) -> Codes:
    """The same, as few entries of each token in any order, and padding at latent 0."""
    order = torch.rand(values.shape).masked_fill(values == 0, 2.0).argsort(dim=1)[:, :-1]
    kept = values.gather(1, order)
    return Codes(kept, order.where(kept != 0, 0), D_SAE)


FORMS = {"every": Codes.every, "listed": listed}


@pytest.mark.parametrize("form", FORMS)
def test_both_forms_are_the_same_codes(form):
    values, W_dec = dense_values(), torch.randn(D_SAE, D_OUT).double()
    codes = FORMS[form](values)
    assert (codes.indices is None) == (form == "every")
    assert torch.equal(codes.to_dense(), values)
    torch.testing.assert_close(codes.decode(W_dec), values @ W_dec)
    assert torch.equal(codes.fired(), (values != 0).any(0))
    assert codes.l0() == (values != 0).sum() / N


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1, 4, D_SAE])
def test_below_leaves_the_first_latents(form, size):
    values, W_dec = dense_values(), torch.randn(D_SAE, D_OUT).double()
    codes = FORMS[form](values).below(size)
    first = values * (torch.arange(D_SAE) < size)
    assert torch.equal(codes.to_dense(), first)
    torch.testing.assert_close(codes.decode(W_dec), first @ W_dec)
    assert not codes.fired()[size:].any()


@pytest.mark.parametrize("form", FORMS)
def test_decoding_is_differentiable(form):
    values, W_dec = dense_values(), torch.randn(D_SAE, D_OUT).double().requires_grad_()
    codes = FORMS[form](values)
    entries = codes.values.clone().requires_grad_()
    loss = codes._replace(values=entries).decode(W_dec).square().sum()
    got = torch.autograd.grad(loss, [entries, W_dec])
    g = 2 * values @ W_dec.detach()
    torch.testing.assert_close(got[1], values.T @ g)
    active = codes.active
    torch.testing.assert_close(got[0][active], (g @ W_dec.T).gather(1, codes.latents())[active])


def test_all_latents_in_another_order_are_not_every():
    """As many indices as latents, sorted otherwise: what they name must count."""
    values, W_dec = torch.randn(N, D_SAE), torch.randn(D_SAE, D_OUT)
    indices = torch.arange(D_SAE).flip(0).repeat(N, 1)
    codes = Codes(values, indices, D_SAE)
    torch.testing.assert_close(codes.decode(W_dec), values.flip(1) @ W_dec)
    one = Codes(values[:1], indices[:1], D_SAE)
    torch.testing.assert_close(one.decode(W_dec), values[:1].flip(1) @ W_dec)


def test_no_tokens():
    codes = Codes.every(torch.ones(0, D_SAE))
    assert codes.l0() == 0
    assert not codes.fired().any()
    assert codes.decode(torch.ones(D_SAE, D_OUT)).shape == (0, D_OUT)


@pytest.mark.parametrize("activation", [BatchTopK(4), ReLU(), JumpReLU(threshold=6.0)], ids=str)
def test_a_few_crowded_tokens_make_all_dense(activation):
    """One token's long list would pad all others to its length."""
    torch.manual_seed(0)
    sae, x = SAE(16, 64, activation), torch.randn(200, 16)
    with torch.no_grad():
        sae.b_enc.fill_(-3.0)
        x[-1] *= 100
    dense = sae.encode(x)
    assert dense.indices is None
    h = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    kept = dense.values != 0
    assert kept[-1].sum() > 16 and kept[:-1].float().sum(1).mean() < 8
    assert torch.equal(dense.values, h.detach().where(kept, 0.0))
    least = h[kept].min()
    assert (h[~kept] <= least).all()
