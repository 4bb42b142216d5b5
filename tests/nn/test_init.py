import torch

from fastsae import SAE, TopK
from fastsae.nn import Init, geometric_median, init_from_data


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
