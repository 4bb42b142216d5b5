import math

import pytest
import torch

from fastsae import SAE, TopK
from fastsae.nn import Init, geometric_median, init_from_data
from fastsae.nn.batchtopk import BatchTopK
from fastsae.nn.gated import Gated, GatedConfig
from fastsae.nn.jumprelu import JumpReLU, JumpReLUConfig
from fastsae.nn.rational import Rational, RationalConfig
from fastsae.nn.relu import ReLU, ReLUConfig


def test_geometric_median_is_where_the_summed_distance_is_least():
    x = torch.randn(200, 5, dtype=torch.float64)
    x[:40] += 50  # a mean would follow them
    median = geometric_median(x, steps=1000, tolerance=1e-12).requires_grad_()
    (gradient,) = torch.autograd.grad((x - median).norm(dim=1).sum(), median)
    assert gradient.norm() < 1e-6 * len(x)
    assert median.norm() < 1 < x.mean(0).norm()


def test_geometric_median_of_equal_rows():
    x = torch.ones(10, 3)
    assert torch.equal(geometric_median(x), x[0])


def test_init_from_data():
    x = torch.randn(100, 8) + 3
    sae = SAE(8, 32, TopK(4))
    init_from_data(sae, x, torch.Generator().manual_seed(1))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(32))
    assert torch.equal(sae.W_enc, sae.W_dec)
    assert not sae.b_enc.any()
    torch.testing.assert_close(sae.b_dec.detach(), geometric_median(x))
    again = init_from_data(SAE(8, 32, TopK(4)), x, torch.Generator().manual_seed(1))
    assert torch.equal(again.W_dec, sae.W_dec)


def test_rows_of_a_transcoder_have_the_length_too():
    x, y = torch.randn(100, 8), torch.randn(100, 5)
    sae = init_from_data(SAE(8, 32, TopK(4), 5), x, target=y, init=Init(row_norm=0.1))
    for rows in (sae.W_enc, sae.W_dec):
        torch.testing.assert_close(rows.norm(dim=1), torch.full((32,), 0.1))


@pytest.mark.parametrize(
    "options", [{}, {"by_norm": True}, {"layers": 2, "by_norm": True}, {"d_out": 5}]
)
@pytest.mark.parametrize(
    ("activation", "start_l0", "active"),
    [
        (ReLUConfig(target_l0=2.5), None, 2.5),
        (JumpReLUConfig(threshold=0.3, target_l0=4.0), None, 4.0),
        (JumpReLUConfig(threshold=0.3, target_l0=4.0), 6.0, 6.0),
        (ReLUConfig(l1_coef=0.1), 1.0, 1.0),
        (GatedConfig(target_l0=3.0), None, 3.0),
        (RationalConfig(gate="relu"), 3.0, 3.0),
        (RationalConfig(gate="jumprelu"), 3.0, 3.0),
    ],
)
def test_each_latent_starts_as_often_active_as_the_others(options, activation, start_l0, active):
    x = torch.randn(500, 8, dtype=torch.float64) + 1
    sae = SAE(8, 32, activation.build(), **options).double()
    target = x[:, :5] if "d_out" in options else None
    init_from_data(sae, x, target=target, init=Init(start_l0=start_l0, row_norm=0.5))
    weights, activation_threshold = sae.weights(), sae.activation.activation_threshold
    assert activation_threshold is not None
    fired = (sae.center(x) @ weights.W_enc.T + weights.b_enc > activation_threshold).sum(0)
    assert (fired == math.ceil(500 * active / 32)).all()
    if not isinstance(sae.activation, Gated):  # whose magnitude can be 0 where the gate is open
        assert torch.equal((sae.encode(x).to_dense() != 0).sum(0), fired)


@pytest.mark.parametrize("activation", [TopK(4), ReLU(l1_coef=0.1), JumpReLU(l0_coef=0.1)], ids=str)
def test_b_enc_starts_at_0_without_a_target(activation):
    sae = init_from_data(SAE(8, 32, activation), torch.randn(100, 8))
    assert not sae.b_enc.any()
    sae = SAE(8, 32, ReLU(target_l0=4.0))
    assert not init_from_data(sae, torch.randn(100, 8), init=Init(start_l0=0.0)).b_enc.any()


@pytest.mark.parametrize(
    ("activation", "start_l0", "message"),
    [
        (TopK(4), 8.0, "start_l0 = 8.0 has no effect on topk"),
        (BatchTopK(4), 8.0, "no effect on batchtopk"),
        (Rational(k=4), 8.0, "no effect on rational"),
        (Rational(gate="relu", support="none"), 8.0, "no effect on rational"),
        (ReLU(target_l0=50.0), None, "fewer active latents than d_sae = 32, got 50.0"),
        (Gated(), None, "fewer active latents than d_sae = 32, got 32.0: lower target_l0"),
        (JumpReLU(), 32.0, "fewer active latents than d_sae = 32, got 32.0"),
    ],
    ids=lambda value: getattr(getattr(value, "cfg", None), "name", str(value)),
)
def test_starts_that_cannot_be(activation, start_l0, message):
    with pytest.raises(ValueError, match=message):
        init_from_data(SAE(8, 32, activation), torch.randn(100, 8), init=Init(start_l0=start_l0))


@pytest.mark.parametrize("activation", [TopK(4), TopK(4, by="abs"), BatchTopK(4)])
@pytest.mark.parametrize("options", [{}, {"by_norm": True}, {"layer_norm": True}, {"layers": 2}])
def test_no_other_length_of_a_fitted_encoder_reconstructs_better(activation, options):
    x = 5 * torch.randn(100, 8, dtype=torch.float64) + 3
    sae = init_from_data(SAE(8, 32, activation, **options).double(), x, init=Init(encoder="fitted"))
    cosine = torch.nn.functional.cosine_similarity(sae.W_enc, sae.W_dec)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))
    assert sae.training
    sae.eval()

    @torch.no_grad()
    def error(factor: float) -> float:
        tokens, weights = sae.tokens(x), sae.weights()
        weights = weights._replace(W_enc=factor * weights.W_enc)
        recon, _ = sae.activation.reconstruct(sae.center(tokens), weights)
        return float((recon - tokens).square().sum())

    assert error(1.0) < min(error(0.99), error(1.01))


def test_only_a_top_k_autoencoder_can_have_a_fitted_encoder():
    Init(encoder="fitted").check(SAE(8, 32, TopK(4)))
    with pytest.raises(ValueError, match="got topk and d_out = 8"):
        Init(encoder="fitted").check(SAE(8, 32, TopK(4), 8))
    with pytest.raises(ValueError, match="topk, abstopk or batchtopk, got jumprelu"):
        Init(encoder="fitted").check(SAE(8, 32, JumpReLU(target_l0=4.0)))
