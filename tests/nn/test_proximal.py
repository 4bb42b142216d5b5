"""Every activation against brute force: it finds the least |z - h|^2 / 2 + R(z).

All numbers are multiples of 1 / 64, small enough that float64 adds and multiplies them without
rounding. So ties occur, the best values lie on the grid that is searched, and the objective of
what an activation chose must be the minimum to the last bit.
"""

import pytest
import torch
from torch import Tensor

from fastsae import AbsTopK, TopK
from fastsae.codes import Codes
from fastsae.nn import Activation, sparse_pre
from fastsae.nn.activation import Weights
from fastsae.nn.batchtopk import BatchTopK
from fastsae.nn.gated import Gated
from fastsae.nn.jumprelu import JumpReLU
from fastsae.nn.rational import Rational
from fastsae.nn.relu import ReLU

UNIT, REACH, F = 1 / 64, 2.0, 6
SEEDS = range(50)
WAYS = {"dense": -1.0, "sparse": 2.0}  # the part of latents from which on there are too many


def on_grid(seed: int, *shape: int, least: float = -REACH) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(int(least / UNIT), int(REACH / UNIT) + 1, shape, generator=generator)
    return drawn.double() * UNIT


def least_objective(
    h: Tensor, l0: Tensor | float, l1: Tensor | float, most: int, signed: bool
) -> Tensor:
    """The minimum over z of |z - h|^2 / 2 + l0 |z|_0 + l1 |z|_1, with at most `most` entries that
    are not 0 and, unless signed, none below 0: over all supports, and on each over a grid."""
    values = torch.arange(-REACH if signed else 0.0, REACH + UNIT, UNIT, dtype=h.dtype)[:, None]
    nonzero = ((values - h).square() / 2 + l1 * values.abs()).amin(0) + l0
    supports = torch.cartesian_prod(*[torch.tensor([False, True])] * len(h))
    supports = supports[supports.sum(1) <= most]
    return nonzero.where(supports, h.square() / 2).sum(1).amin()


def objective(
    z: Tensor, h: Tensor, l0: Tensor | float, l1: Tensor | float, most: int, signed: bool
) -> Tensor:
    """The same of one z that is allowed."""
    assert (z != 0).sum() <= most
    assert signed or (z >= 0).all()
    return ((z - h).square() / 2 + l1 * z.abs() + l0 * (z != 0)).sum()


def encoded(activation: Activation, h: Tensor, b_enc: Tensor | float = 0.0) -> Tensor:
    """The codes of pre-activations h + b_enc, dense."""
    d_sae = h.shape[1]
    activation.double().train()
    bias = torch.zeros(d_sae).double() + b_enc
    eye = torch.eye(d_sae).double()
    return activation.encode(h, Weights(eye, bias, eye, bias)).to_dense().detach()


@pytest.mark.parametrize("k", [1, 3, F])
@pytest.mark.parametrize("make", [TopK, AbsTopK])
def test_topk(make, k):
    activation = make(k)
    H = on_grid(k, len(SEEDS), F)
    for z, h in zip(encoded(activation, H), H, strict=True):
        problem = h, 0, 0, k, activation.signed
        assert objective(z, *problem) == least_objective(*problem)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("by", ["value", "abs"])
def test_batchtopk_is_one_step_for_all_tokens_together(by, seed):
    N, k, d_sae = 3, 1 + seed % 2, 4
    activation = BatchTopK(k, by=by)
    H = on_grid(seed, N, d_sae)
    z = encoded(activation, H)
    activation.after_step(Codes.every(z))
    problem = H.flatten(), 0, 0, k * N, by == "abs"
    assert objective(z.flatten(), *problem) == least_objective(*problem)
    assert activation.threshold == z[z != 0].abs().amin()


@pytest.mark.parametrize("way", WAYS)
def test_relu(way, monkeypatch):
    monkeypatch.setattr(sparse_pre, "DENSE", WAYS[way])
    H, penalty = on_grid(1, len(SEEDS), F), on_grid(2, F, least=0.0)
    for z, h in zip(encoded(ReLU(), H, b_enc=-penalty), H, strict=True):
        problem = h, 0, penalty, F, False
        assert objective(z, *problem) == least_objective(*problem)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_jumprelu(way, trained, monkeypatch):
    """Whether or not entries just below their threshold are listed for its gradient."""
    monkeypatch.setattr(sparse_pre, "DENSE", WAYS[way])
    H, threshold = on_grid(3, len(SEEDS), F), on_grid(4, F, least=0.0)
    H[:9] = threshold  # where it makes no difference whether an entry is kept
    penalty = threshold.square() / 2
    activation = JumpReLU(bandwidth=0.5)
    activation.build(F, F)
    activation.threshold.data = threshold
    with torch.set_grad_enabled(trained):
        codes = encoded(activation, H)
    for z, h in zip(codes, H, strict=True):
        problem = h, penalty, 0, F, False
        assert objective(z, *problem) == least_objective(*problem)


@pytest.mark.parametrize("way", WAYS)
def test_the_gate_is_that_of_relu_and_magnitudes_do_not_shrink(way, monkeypatch):
    monkeypatch.setattr(sparse_pre, "DENSE", WAYS[way])
    H, penalty = on_grid(5, len(SEEDS), F), on_grid(6, F, least=0.0)
    activation = Gated()
    activation.build(F, F)
    codes = encoded(activation, H, b_enc=-penalty)
    for z, h in zip(codes, H, strict=True):
        shrunk = (h - penalty).where(z != 0, 0.0)
        problem = h, 0, penalty, F, False
        assert objective(shrunk, *problem) == least_objective(*problem)
        assert torch.equal(z, h.where(z != 0, 0.0))
    assert (codes != 0).any()


@pytest.mark.parametrize("center", ["gate", "zero"])
def test_a_rational_function_that_rises_is_one_too(center):
    """Of R with R'(phi(h)) = h - phi(h), here as a sum over what the gate keeps of a grid."""
    activation = Rational(gate="jumprelu", center=center)
    activation.build(64, 1)
    activation.change.data.uniform_(-0.02, 0.02, generator=torch.Generator().manual_seed(7))
    h = torch.linspace(0, 4, 500).double()
    phi = encoded(activation, h[:, None])[:, 0]
    kept = h > activation.threshold
    assert torch.equal(phi != 0, kept)
    h, phi = h[kept], phi[kept]
    assert (phi.diff() > 0).all() and (phi - h).abs().max() > 0.05, (
        "else there is no R, or none to see"
    )
    slope = h - phi
    R = torch.cat([h.new_zeros(1), ((slope[1:] + slope[:-1]) / 2 * phi.diff()).cumsum(0)])
    chosen = ((phi - h[:, None]).square() / 2 + R).argmin(1)
    assert torch.equal(chosen, torch.arange(len(h)))
