"""Both ways of taking a step, and Adam, against plain PyTorch."""

import copy

import pytest
import torch

from fastsae import SAE, AbsTopK, TopK
from fastsae.losses import training_loss
from fastsae.train import step as step_module
from fastsae.train.optim import Adam, default_lr, normalise_rows_, schedule
from fastsae.train.step import autograd_step, fused_step

D_IN, D_SAE, K, K_AUX = 12, 70, 4, 6
DEAD = {"none": lambda: None, "some": lambda: torch.arange(D_SAE) % 5 == 0}


@pytest.fixture(params=[TopK(K), AbsTopK(K)], ids=["topk", "abstopk"])
def sae(request):
    sae = SAE(D_IN, D_SAE, request.param).double()
    with torch.no_grad():
        sae.b_enc.normal_(std=0.1)
        sae.b_dec.normal_()
        sae.b_enc[:3] = -100.0  # latents that never fire
        sae.b_enc[3] = 0 if request.param.signed else 5.0  # and one that always does
    return sae


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks and chunks that split this small problem as large ones are split."""
    monkeypatch.setattr(step_module, "BLOCK_BYTES", 16 * D_IN * 8)
    monkeypatch.setattr(step_module, "AUX_BYTES", 7 * 14 * 8)


def torch_adam_steps(sae, batches, dead, lr):
    """The recipe with torch.optim.Adam on dense gradients."""
    adam = torch.optim.Adam(sae.parameters(), lr=lr, eps=6.25e-10)
    for x in batches:
        adam.zero_grad()
        training_loss(sae, x, dead, 1 / 32, K_AUX).loss.backward()
        W = sae.W_dec.detach()
        sae.W_dec.grad -= (sae.W_dec.grad * W).sum(1, keepdim=True) * W
        adam.step()
        normalise_rows_(sae.W_dec.data)


@pytest.mark.parametrize("dead", DEAD)
@pytest.mark.parametrize("take", [autograd_step, fused_step])
def test_fifty_steps_equal_torch_adam(sae, dead, take, small_blocks):
    batches = [torch.randn(33, D_IN, dtype=torch.float64) for _ in range(50)]
    expected = copy.deepcopy(sae)
    torch_adam_steps(expected, batches, DEAD[dead](), lr=1e-2)
    adam = Adam(dict(sae.named_parameters()))
    for x in batches:
        adam.begin_step(1e-2)
        take(sae, adam, x, DEAD[dead](), 1 / 32, K_AUX)
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(
            parameter, expected.get_parameter(name), rtol=1e-9, atol=1e-9, msg=name
        )


@pytest.mark.parametrize("dead", DEAD)
def test_both_ways_report_the_same(sae, dead):
    x, results = torch.randn(40, D_IN, dtype=torch.float64), []
    for take in (autograd_step, fused_step):
        model = copy.deepcopy(sae)
        adam = Adam(dict(model.named_parameters()))
        adam.begin_step(1e-3)
        results.append(take(model, adam, x, DEAD[dead](), 1 / 32, K_AUX))
    for a, b in zip(results[0][:4], results[1][:4], strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(results[0].codes.indices, results[1].codes.indices)


def test_the_shadow_follows_the_weights(sae):
    sae = sae.float()
    shadow = sae.W_enc.detach().bfloat16()
    adam = Adam(dict(sae.named_parameters()))
    for _ in range(3):
        adam.begin_step(1e-2)
        fused_step(sae, adam, torch.randn(40, D_IN), None, 0.0, K_AUX, shadow)
    assert torch.equal(shadow, sae.W_enc.detach().bfloat16())


def test_the_same_step_gives_the_same_bits(sae):
    sae, x = sae.float(), torch.randn(100, D_IN)
    weights = []
    for _ in range(2):
        model = copy.deepcopy(sae)
        adam = Adam(dict(model.named_parameters()))
        for _ in range(3):
            adam.begin_step(1e-2)
            fused_step(model, adam, x, DEAD["some"](), 1 / 32, K_AUX)
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_schedule():
    factors = [schedule(step, 100, 10, 0.2) for step in range(100)]
    assert factors[0] == 1 / 11
    assert factors[10:80] == [1.0] * 70
    assert factors[90] == 0.5
    assert factors[-1] == 1 / 20
    assert schedule(0, 100, 0, 0.0) == 1
    assert default_lr(2**14, 15_000) == 2e-4
    assert default_lr(2**12, 10**6) == 4e-4
    assert default_lr(2**12, 600) == 2e-3


def test_float32_figures_at_a_real_size():
    """FVU of a [4096, 512] batch is as exact as its float64 formula allows."""
    x = torch.randn(4096, 512) + 1
    sae = SAE(512, 1024, TopK(8))
    exact = training_loss(copy.deepcopy(sae).double(), x.double()).fvu
    adam = Adam(dict(sae.named_parameters()))
    adam.begin_step(1e-3)
    fvu = fused_step(sae, adam, x, None, 0.0, 1).fvu
    torch.testing.assert_close(fvu.double(), exact, rtol=1e-6, atol=0)
