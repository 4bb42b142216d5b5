import math

import pytest
import torch

from fastsae import SAE, TopK
from fastsae.nn import Init, geometric_median, init_from_data
from fastsae.nn.activations import activation_of
from fastsae.nn.jumprelu import JumpReLU, JumpReLUConfig
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
    "ends", [{}, {"by_norm": True}, {"layers": 2, "by_norm": True}, {"d_out": 5}]
)
@pytest.mark.parametrize(
    ("activation", "start_l0", "active"),
    [
        (ReLUConfig(target_l0=2.5), None, 2.5),
        (JumpReLUConfig(threshold=0.3, target_l0=4.0), None, 4.0),
        (JumpReLUConfig(threshold=0.3, target_l0=4.0), 6.0, 6.0),
        (ReLUConfig(l1_coef=0.1), 1.0, 1.0),
    ],
)
def test_each_latent_starts_as_often_active_as_the_others(ends, activation, start_l0, active):
    x = torch.randn(500, 8, dtype=torch.float64) + 1
    sae = SAE(8, 32, activation_of(activation), **ends).double()
    target = x[:, :5] if "d_out" in ends else None
    init_from_data(sae, x, target=target, init=Init(start_l0=start_l0, row_norm=0.5))
    fired = (sae.encode(x).to_dense() != 0).sum(0)
    assert (fired == math.ceil(500 * active / 32)).all()


@pytest.mark.parametrize("activation", [TopK(4), ReLU(l1_coef=0.1), JumpReLU(l0_coef=0.1)], ids=str)
def test_b_enc_starts_at_0_without_a_target(activation):
    sae = init_from_data(SAE(8, 32, activation), torch.randn(100, 8))
    assert not sae.b_enc.any()
    sae = SAE(8, 32, ReLU(target_l0=4.0))
    assert not init_from_data(sae, torch.randn(100, 8), init=Init(start_l0=0.0)).b_enc.any()


@pytest.mark.parametrize(
    ("activation", "start_l0"), [(TopK(4), 32.0), (ReLU(target_l0=50.0), None)]
)
def test_a_start_with_every_latent_is_refused(activation, start_l0):
    with pytest.raises(ValueError, match="start_l0, .*, must be below d_sae = 32, got"):
        init_from_data(SAE(8, 32, activation), torch.randn(100, 8), init=Init(start_l0=start_l0))
