"""training_loss of every architecture against its dense formula, value and every gradient."""

import copy
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastsae import SAE, Codes
from fastsae.losses import Objective, training_loss
from fastsae.nn import sparse_pre, variational
from fastsae.nn.jumprelu import JumpReLU
from fastsae.nn.variational import LOG_VARIANCE, Variational
from fastsae.train.optim import Adam
from fastsae.train.step import autograd_step, fused_step

from .architectures import ARCHITECTURES, D_IN, D_SAE, Architecture, dense_loss, log_fvu

N, CHUNK, SEED = 45, 20, 3
DEAD = torch.arange(1, D_SAE, 3)
WAYS = {"dense": -1.0, "sparse": 2.0}  # the part of latents from which on there are too many
THRESHOLDED = ("jumprelu", "relu", "gated", "rational")
CASES = [
    (name, way)
    for name, architecture in ARCHITECTURES.items()
    for way in WAYS
    if way == "sparse" or architecture.activation.name in THRESHOLDED
]


class Problem(NamedTuple):
    sae: SAE
    x: Tensor
    y: Tensor
    objective: Objective

    def to(self, dtype: torch.dtype) -> "Problem":
        sae = copy.deepcopy(self.sae).to(dtype)
        return Problem(sae, self.x.to(dtype), self.y.to(dtype), self.objective)


def problem_of(architecture: Architecture) -> Problem:
    """Weights of no special form and data, in float64, of numbers that float32 has too."""
    sae = architecture.build()
    x, y = torch.randn(N, D_IN) + 0.5, torch.randn(N, len(sae.b_dec)) - 0.5
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        if isinstance(sae.activation, JumpReLU):
            sae.activation.threshold.clamp_(min=0)
        sae.W_dec.mul_(0.5 + torch.rand(D_SAE, 1))
        sae.b_enc.sub_(0.3)
    y = x if sae.d_out is None else y
    objective = replace(architecture.objective, auxk_coef=0.5, k_aux=5)
    return Problem(sae, x, y, objective).to(torch.float64)


def noise_of(sae: SAE, dtype: torch.dtype) -> Tensor | None:
    """What a variational SAE draws with SEED, a chunk of tokens at a time."""
    if getattr(sae.activation.cfg, "variance", "none") == "none":
        return None
    torch.manual_seed(SEED)
    parts = []
    for rows in torch.arange(N).split(CHUNK):
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        parts.append(torch.randn(len(rows), D_SAE, generator=generator, dtype=dtype))
    return torch.cat(parts)


def differentiated(sae: SAE, loss: Tensor) -> dict[str, Tensor]:
    """A loss and its gradients, in float64."""
    names, parameters = zip(*sae.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    values = {"loss": loss.detach(), **dict(zip(names, gradients, strict=True))}
    return {name: value.double() for name, value in values.items()}


def dense(problem: Problem, noise: Tensor | None, progress: float) -> dict[str, Tensor]:
    sae, x, y, objective = problem
    noise = None if noise is None else noise.to(x)
    return differentiated(sae, dense_loss(sae, x, y, DEAD, objective, progress, noise))


def trained(problem: Problem, progress: float) -> dict[str, Tensor]:
    sae, x, y, objective = problem
    target = None if sae.d_out is None else y
    torch.manual_seed(SEED)
    result = training_loss(sae, x, DEAD, objective, target, progress)
    return differentiated(sae, result.loss)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(variational, "rows_at_a_time", lambda x, F: CHUNK)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("name", "way"), CASES)
def test_gradients_equal_dense_autograd(name, way, dtype, monkeypatch):
    """Errors are no larger than twice those of the formula in float32, scaled to the dtype, and
    one rounding of all gradients together: parts of them cancel, in some orders exactly."""
    monkeypatch.setattr(sparse_pre, "DENSE", WAYS[way])
    problem, progress = problem_of(ARCHITECTURES[name]), 0.06
    noise = noise_of(problem.sae, dtype)
    exact = dense(problem, noise, progress)
    low = dense(problem.to(torch.float32), noise, progress)
    got = trained(problem.to(dtype), progress)
    eps, scale = torch.finfo(dtype).eps, torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    rounding = eps * torch.stack([reference.norm() for reference in exact.values()]).norm()
    for part, reference in exact.items():
        assert reference.any(), f"{part} must matter"
        error, own = ((value[part] - reference).norm() for value in (got, low))
        allowed = 2 * (scale * own + rounding)
        assert error <= allowed, f"{part}: error {error:.1e} > {allowed:.1e}"


@pytest.mark.parametrize("progress", [0.0, 0.05, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(
    "name", ["relu", "annealed relu", "jumprelu", "gated", "vsae without noise"]
)
def test_penalties_rise_and_exponents_fall_with_progress(name, progress):
    problem = problem_of(ARCHITECTURES[name])
    exact, got = dense(problem, None, progress), trained(problem, progress)
    for part, reference in exact.items():
        torch.testing.assert_close(got[part], reference, msg=part)
    whole = trained(problem, 1.0)["loss"]
    assert (got["loss"] < whole) == (progress < 0.1), "penalties rise over a tenth of training"


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("n_dead", [0, 3, 4])
def test_fewer_dead_latents_than_auxk_takes(name, n_dead, monkeypatch):
    """Their task weighs less, and no more than they are can be chosen."""
    problem, noise = problem_of(ARCHITECTURES[name]), None
    monkeypatch.setattr(f"{__name__}.DEAD", DEAD[:n_dead])
    noise = noise_of(problem.sae, torch.float64)
    exact, got = dense(problem, noise, 1.0), trained(problem, 1.0)
    for part, reference in exact.items():
        torch.testing.assert_close(got[part], reference, msg=part)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parts_of_the_loss(name):
    """The loss is made of what is reported with it, and codes count what is active."""
    sae, x, y, objective = problem_of(ARCHITECTURES[name])
    if sae.layer_norm:  # the loss is that of tokens as it sees them
        x = sae.tokens(x)
        y = x if sae.d_out is None else y
        sae.layer_norm = False
    target = None if sae.d_out is None else y
    variance = (y - y.mean(0)).square().sum()
    unit = 1 / N if objective.error == "sse" else 1 / variance
    result = training_loss(sae, x, DEAD, objective, target)
    assert result.l0 == (result.codes.to_dense() != 0).sum() / N
    if objective.plain:
        terms = unit * N * result.penalty + 0.5 * result.auxk
        own = unit * result.fvu * variance
        if objective.error == "log_fvu":
            own, terms = result.fvu.log(), terms / result.fvu
        torch.testing.assert_close(result.loss, own + terms)
    recon = sae.decode(result.codes, x)
    torch.testing.assert_close(result.fvu * variance, (y - recon).square().sum())


@pytest.mark.parametrize(("name", "way"), CASES)
def test_tokens_of_few_active_latents_and_of_none(name, way, monkeypatch):
    """Where fewer than k pre-activations are positive; latents that no token activates."""
    monkeypatch.setattr(sparse_pre, "DENSE", WAYS[way])
    problem = problem_of(ARCHITECTURES[name])
    sae, x, y, _ = problem
    with torch.no_grad():
        sae.W_enc[:, 0] = -sae.W_enc[:, 0].abs() - 0.5
        sae.b_enc[::4] = -50.0
        x[:5, 0] += 30.0
        x[5:12, 0] += 3.0
        if sae.d_out is None:
            y.copy_(x)
    count = (sae.encode(x).to_dense() != 0).sum(1)
    every = getattr(sae.activation.cfg, "support", None) == "none"
    if not sae.activation.signed and not every:
        assert not count[:5].any() and (count > 0).any()
    noise = noise_of(sae, torch.float64)
    exact, got = dense(problem, noise, 1.0), trained(problem, 1.0)
    for part, reference in exact.items():
        torch.testing.assert_close(got[part], reference, msg=part)


def test_a_log_variance_beyond_its_limits_is_clamped():
    problem = problem_of(ARCHITECTURES["vsae of learned variance"])
    activation = problem.sae.activation
    assert isinstance(activation, Variational)
    with torch.no_grad():
        activation.b_variance[::2] += 4.0
        activation.b_variance[1::2] -= 4.0
    variance = problem.sae.center(problem.x) @ activation.W_variance.T + activation.b_variance
    assert variance.amin() < LOG_VARIANCE[0] < LOG_VARIANCE[1] < variance.amax()
    noise = noise_of(problem.sae, torch.float64)
    exact, got = dense(problem, noise, 1.0), trained(problem, 1.0)
    for part, reference in exact.items():
        torch.testing.assert_close(got[part], reference, msg=part)


@pytest.mark.parametrize("way", WAYS)
def test_a_threshold_that_a_step_took_below_0_counts_as_0(way, monkeypatch):
    """In use as in training, where it is trained on from 0."""
    monkeypatch.setattr(sparse_pre, "DENSE", WAYS[way])
    problem = problem_of(ARCHITECTURES["jumprelu"])
    sae, x = problem.sae, problem.x
    assert isinstance(sae.activation, JumpReLU)
    threshold = sae.activation.threshold
    with torch.no_grad():
        threshold[::2] = 0.0
        expected = sae.encode(x).to_dense()
        threshold[::2] = -0.2
        torch.testing.assert_close(sae.encode(x).to_dense(), expected)
    assert (expected[:, ::2] != 0).any() and (expected >= 0).all()
    sae.activation.after_step(sae.encode(x))
    assert (threshold >= 0).all()
    gradient = trained(problem, 1.0)["activation.threshold"]
    assert gradient[::2].any(), "of its penalty; that of its value is 0 at 0"


@pytest.mark.parametrize("objective", [log_fvu(), Objective(error="sse", auxk_error="absolute")])
@pytest.mark.parametrize("name", ["topk", "abstopk", "batchtopk", "batchabstopk"])
def test_the_fused_step_is_the_same(name, objective):
    """Weights, and what the activation takes note of, after steps of both kinds."""
    first = problem_of(ARCHITECTURES[name])
    objective = replace(objective, auxk_coef=0.5, k_aux=5)
    batches = torch.randn(5, N, D_IN, dtype=torch.float64)
    saes = []
    for take in (autograd_step, fused_step):
        sae = copy.deepcopy(first.sae)
        adam = Adam(sae)
        for x in batches:
            adam.begin_step(1e-2)
            take(sae, adam, x, DEAD, objective)
        saes.append(sae.state_dict())
    for part, value in saes[0].items():
        torch.testing.assert_close(saes[1][part], value, msg=part)
        assert not torch.equal(value, first.sae.state_dict()[part]), f"{part} must have moved"


@pytest.mark.parametrize("name", ["crosscoder", "batchtopk crosscoder", "vsae crosscoder"])
def test_training_goes_on_from_a_folded_crosscoder(name):
    """Which is no longer by_norm: for data scaled as before, its norms are 1 and change nothing."""
    sae, x, *_ = problem_of(ARCHITECTURES[name])
    trained(Problem(sae, x, x, Objective()), 1.0)
    factors = torch.tensor([0.25, 3.0]).double().repeat_interleave(D_IN // 2)
    saved = copy.deepcopy(sae).fold_columns_(factors)
    assert sae.by_norm and not saved.by_norm
    again = ARCHITECTURES[name].build().double()
    again.load_state_dict(saved.fold_columns_(1 / factors).state_dict())
    assert again.by_norm
    for one, other in zip(again.eval().reconstruct(x), sae.eval().reconstruct(x), strict=True):
        dense = [t.to_dense() if isinstance(t, Codes) else t for t in (one, other)]
        torch.testing.assert_close(*dense)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_evaluating_a_loss_changes_no_state(name):
    sae, x, y, objective = problem_of(ARCHITECTURES[name])
    before = copy.deepcopy(sae.state_dict())
    training_loss(sae, x, DEAD, objective, None if sae.d_out is None else y)
    for part, value in sae.state_dict().items():
        assert torch.equal(value, before[part]), part


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_loss_without_gradients_is_the_same(name):
    sae, x, y, objective = problem_of(ARCHITECTURES[name])
    losses = []
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        torch.manual_seed(0)
        with mode():
            found = training_loss(sae, x, DEAD, objective, None if sae.d_out is None else y)
            losses.append(float(found.loss.detach()))
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_step_without_tokens_adapts_to_finite_values(name):
    sae, x, *_ = problem_of(ARCHITECTURES[name])
    sae.activation.after_step(sae.encode(x[:0]))
    assert all(value.isfinite().all() for value in sae.state_dict().values())
