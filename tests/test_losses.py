"""training_loss against a dense formula in float64, value and every gradient."""

import copy

import pytest
import torch
from torch import Tensor

from fastsae import SAE, AbsTopK, TopK
from fastsae.losses import Objective, training_loss
from fastsae.train.optim import Adam
from fastsae.train.step import autograd_step, fused_step

N, D_IN, D_SAE, K = 48, 24, 96, 6
ACTIVATIONS = {"topk": TopK(K), "abstopk": AbsTopK(K)}
DEAD = {
    "no aux": lambda: None,
    "none dead": lambda: torch.arange(0),
    "few dead": lambda: torch.arange(0, D_SAE, 20),  # fewer than k_aux
    "many dead": lambda: torch.arange(0, D_SAE, 3),
    "all dead": lambda: torch.arange(D_SAE),
}


def keep(pre: Tensor, k: int, signed: bool) -> Tensor:
    """Dense top-k codes by a stable sort."""
    rank = pre.abs() if signed else pre
    best = rank.sort(dim=1, descending=True, stable=True).indices[:, :k]
    codes = pre * torch.zeros_like(pre).scatter(1, best, 1.0)
    return codes if signed else codes.relu()


def dense_loss(
    sae: SAE, x: Tensor, dead: Tensor | None, coef: float, k_aux: int, error: str
) -> Tensor:
    """The formula of fastsae.losses with every tensor written out; autograd does the rest."""
    signed = sae.activation.signed
    pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    recon = keep(pre, K, signed) @ sae.W_dec + sae.b_dec
    fvu = (x - recon).square().sum() / (x - x.mean(0)).square().sum()
    loss, proportion = (fvu.log(), 1 / fvu.detach()) if error == "log_fvu" else (fvu, 1)
    if dead is not None and len(dead):
        residual = (x - recon).detach()
        codes = keep(pre[:, dead], min(k_aux, len(dead)), signed)
        auxk = (codes @ sae.W_dec[dead] - residual).square().sum()
        auxk /= (residual - residual.mean(0)).square().sum()
        loss = loss + coef * min(len(dead) / k_aux, 1) * proportion * auxk
    return loss


@pytest.fixture(params=ACTIVATIONS)
def problem(request):
    """An SAE and data; in the first rows fewer than k pre-activations are positive."""
    sae = SAE(D_IN, D_SAE, ACTIVATIONS[request.param]).double()
    x = torch.randn(N, D_IN, dtype=torch.float64) + 1
    with torch.no_grad():
        sae.W_enc.add_(0.1 * torch.randn_like(sae.W_enc))
        sae.b_enc.normal_(std=0.1)
        sae.b_dec.normal_()
        sae.W_enc[:, 0] = -sae.W_enc[:, 0].abs() - 0.1
        x[:8, 0] += 20.0
    pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    assert ((pre[:8] > 0).sum(1) < K).any(), "the planted rows must have few positives"
    return sae, x


@pytest.mark.parametrize("dead", DEAD)
@pytest.mark.parametrize("error", ["fvu", "log_fvu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_equal_dense_float64_autograd(problem, dead, error, dtype):
    sae, x = problem
    if dtype == torch.float32:  # the reference sees the same, already rounded, numbers
        sae, x = sae.float().double(), x.float().double()
    rows, k_aux = DEAD[dead](), 10
    exact = dense_loss(sae, x, rows, 1 / 32, k_aux, error)
    parameters = dict(sae.named_parameters())
    expected = torch.autograd.grad(exact, list(parameters.values()))

    sae = sae.to(dtype)
    got = training_loss(sae, x.to(dtype), rows, Objective(error=error, k_aux=k_aux))
    gradients = torch.autograd.grad(got.loss, list(sae.parameters()))
    torch.testing.assert_close(got.loss.double(), exact, rtol=1e-6, atol=0)
    for name, gradient, reference in zip(parameters, gradients, expected, strict=True):
        distance = (gradient - reference).norm() / reference.norm()
        assert distance <= 1e-6, f"{name}: {distance:.1e}"


def test_auxk_trains_the_encoder_of_dead_latents(problem):
    """Dead latents that are far from firing get a gradient through aux-k, and only so."""
    sae, x = problem
    x = x[8:]  # tokens with enough positive pre-activations for the live latents
    dead = torch.arange(D_SAE - 4, D_SAE)
    with torch.no_grad():
        sae.W_enc[dead] *= 1e-3
        sae.b_enc[dead] = 0.05
    assert not training_loss(sae, x).codes.fired()[dead].any()
    without, with_aux = (training_loss(sae, x, rows) for rows in (None, dead))
    assert not torch.autograd.grad(without.loss, sae.W_enc)[0][dead].any()
    assert torch.autograd.grad(with_aux.loss, sae.W_enc)[0][dead].any(1).all()


def test_inactive_entries_get_no_gradient():
    """A latent that is kept but set to 0 by the ReLU is not trained."""
    sae = SAE(4, 8, TopK(8))
    x = torch.randn(5, 4)
    with torch.no_grad():
        sae.b_enc[0] = -100.0
    result = training_loss(sae, x)
    never = ~result.codes.fired()
    assert never[0]
    for parameter in (sae.W_enc, sae.b_enc, sae.W_dec):
        (gradient,) = torch.autograd.grad(result.loss, parameter, retain_graph=True)
        assert not gradient[never].any()


def test_parts_of_the_loss(problem):
    sae, x = problem
    dead = DEAD["few dead"]()
    result = training_loss(sae, x, dead, Objective(error="fvu", auxk_coef=0.5, k_aux=10))
    weight = 0.5 * min(len(dead) / 10, 1)
    torch.testing.assert_close(result.loss, result.fvu + weight * result.auxk)
    assert result.l0 == (sae.encode(x).to_dense() != 0).sum(1).double().mean()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k_aux": 0}, "k_aux must be at least 1, got 0"),
        ({"auxk_coef": -1.0}, "auxk_coef must be at least 0, got -1.0"),
        ({"auxk_coef": 0.0, "k_aux": 8}, "k_aux = 8 has no effect with auxk_coef = 0"),
        ({"prefixes": (8, 8)}, r"prefixes must be above 0 and rise, got \(8, 8\)"),
        ({"prefixes": (0, 8)}, r"prefixes must be above 0 and rise, got \(0, 8\)"),
    ],
)
def test_nonsense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Objective(**arguments)


def test_leading_dimensions_are_flattened(problem):
    sae, x = problem
    assert torch.equal(training_loss(sae, x.view(4, 12, -1)).loss, training_loss(sae, x).loss)


def test_only_a_transcoder_takes_a_target():
    x, message = torch.ones(3, 4), "transcoders require `target`; autoencoders must not"
    with pytest.raises(ValueError, match=message):
        training_loss(SAE(4, 8, TopK(2), d_out=4), x)
    with pytest.raises(ValueError, match=message):
        training_loss(SAE(4, 8, TopK(2)), x, target=x)


@pytest.mark.parametrize("take", [autograd_step, fused_step])
@pytest.mark.parametrize("error", ["fvu", "log_fvu"])
@pytest.mark.parametrize("value", [0.0, 0.7, 1e4])
def test_a_batch_of_equal_rows_trains_nothing_and_counts_as_reconstructed(take, error, value):
    """They have no variance, whatever the rounding of their mean."""
    sae = SAE(D_IN, D_SAE, TopK(K))
    before = copy.deepcopy(sae.state_dict())
    adam = Adam(sae)
    adam.begin_step(1e-2)
    x = torch.full((1000, D_IN), value)
    result = take(sae, adam, x, torch.arange(0, D_SAE, 3), Objective(error=error, auxk_coef=0.0))
    assert result.loss == result.fvu == 0
    for name, weight in sae.state_dict().items():
        torch.testing.assert_close(weight, before[name])
    result = take(sae, adam, x, torch.arange(0, D_SAE, 3), Objective(error=error))
    assert result.auxk == 0 and all(weight.isfinite().all() for weight in sae.parameters())
