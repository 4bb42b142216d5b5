"""What activations take note of while they train: thresholds, coefficients."""

import math

import pytest
import torch

from fastsae import SAE
from fastsae.losses import Objective, training_loss
from fastsae.nn.batchtopk import BatchTopK
from fastsae.nn.gated import Gated
from fastsae.nn.jumprelu import JumpReLU
from fastsae.nn.penalty import GAIN, REACH, Coefficient
from fastsae.nn.relu import ReLU
from fastsae.train.optim import Optimizer

from .curves.training import small_steps, train

D_IN, D_SAE, K, N = 16, 64, 4, 64


def smallest_kept(sae: SAE, x: torch.Tensor, by: str) -> torch.Tensor:
    h = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    rank = h.abs() if by == "abs" else h
    return rank.flatten().sort(descending=True).values[K * len(x) - 1]


@pytest.mark.parametrize("by", ["value", "abs"])
def test_the_threshold_is_the_running_mean_of_the_smallest_kept(by):
    activation = BatchTopK(K, by=by, momentum=0.75)
    sae, expected, x = SAE(D_IN, D_SAE, activation).double(), None, torch.empty(0, D_IN)
    assert activation.threshold < 0
    for _ in range(4):
        x = torch.randn(N, D_IN).double()
        least = smallest_kept(sae, x, by)
        expected = least if expected is None else 0.75 * expected + 0.25 * least
        activation.after_step(training_loss(sae, x).codes)
        torch.testing.assert_close(activation.threshold, expected)
    training_loss(sae, x[:0])
    sae.eval()(x)
    torch.testing.assert_close(activation.threshold, expected, msg="no batch, or no training")


@pytest.mark.parametrize("by", ["value", "abs"])
def test_single_tokens_are_active_above_the_threshold(by):
    """And as often as in training, within the sampling error of the batches."""
    momentum, batches = 0.9, 40
    activation = BatchTopK(K, by=by, momentum=momentum)
    sae = SAE(D_IN, D_SAE, activation).double()
    for _ in range(batches):
        activation.after_step(training_loss(sae, torch.randn(N, D_IN).double()).codes)
    sae.eval()
    counts = []
    for _ in range(batches):
        x = torch.randn(N, D_IN).double()
        h = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
        rank = h.abs() if by == "abs" else h
        expected = h.where(rank > activation.threshold, 0.0)
        codes = sae.encode(x)
        torch.testing.assert_close(codes.to_dense(), expected)
        torch.testing.assert_close(sae.encode(x[:1]).to_dense(), codes.to_dense()[:1])
        counts.append(codes.l0())
    l0, spread = torch.stack(counts).mean(), torch.stack(counts).std()
    share = (1 - momentum) / (1 + momentum)  # of a batch's variance in the running mean
    assert (l0 - K).abs() < 4 * spread * math.sqrt(share + 1 / batches)


@pytest.mark.parametrize(
    ("l0", "excess"), [(0.0, -REACH), (2.0, -math.log(2)), (6.0, math.log(1.5)), (64.0, REACH)]
)
def test_a_coefficient_follows_the_l0(l0, excess):
    """And the penalty, faster."""
    coefficient = Coefficient(None, 4.0)
    before = coefficient.value.clone()
    penalty = coefficient(torch.tensor(2.0), torch.tensor(l0))
    torch.testing.assert_close(penalty, 2 * before * math.exp(2 * excess))
    coefficient.after_step(torch.tensor(l0))
    torch.testing.assert_close(coefficient.value, before * math.exp(GAIN * excess))


def test_a_given_coefficient_stays():
    coefficient = Coefficient(0.0, None)
    assert coefficient(torch.tensor(2.0), torch.tensor(64.0)) == 0
    assert coefficient.value == 0


@pytest.mark.parametrize(
    "activation",
    [
        ReLU(target_l0=6.0),
        ReLU(target_l0=6.0, p_end=0.5),
        Gated(target_l0=6.0),
        JumpReLU(target_l0=6.0, bandwidth=0.2, threshold=0.1),
    ],
    ids=["relu", "annealed", "gated", "jumprelu"],
)
def test_a_penalty_reaches_its_target_l0(activation):
    """At least nineteen twentieths of the way there, and it stays."""
    sae = SAE(D_IN, D_SAE, activation)
    with small_steps():
        results = train(sae, Objective(), Optimizer(), steps=400, lr=5e-3)
    missed = (torch.stack([result.l0 for result in results]) - 6.0).abs()
    assert missed[0] > 20.0
    assert missed[-50:].mean() < missed[0] / 20
    assert results[-1].fvu < results[0].fvu / 4
