"""The layers for modules of one's own, against plain dense layers."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.testing import assert_close

from fastsae.nn import CodesLinear, TopKLinear
from fastsae_kernels.topk import By, topk_reference

D_IN, D_SAE, D_OUT, K = 6, 40, 5, 3


class Block(nn.Module):
    """A sparse middle in a network of one's own."""

    def __init__(self, by: By = "value", dtype: torch.dtype = torch.float32):
        super().__init__()
        self.first = nn.Linear(D_IN, D_IN, dtype=dtype)
        self.encoder = TopKLinear(D_IN, D_SAE, K, by, dtype=dtype)
        self.decoder = CodesLinear(D_SAE, D_OUT, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        codes = self.encoder(self.first(x).relu())
        return self.decoder(codes).view(*x.shape[:-1], D_OUT)

    def dense(self, x: Tensor) -> Tensor:
        pre = linear(self.first(x).relu(), self.encoder.weight, self.encoder.bias)
        values, indices = topk_reference(pre.flatten(0, -2), K, self.encoder.by)
        codes = torch.zeros_like(pre).flatten(0, -2).scatter(1, indices, values)
        recon = linear(codes, self.decoder.weight.T, self.decoder.bias)
        return recon.view(*x.shape[:-1], D_OUT)


def gradients(block: Block, out: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out.square().sum(), [*block.parameters()])


@pytest.mark.parametrize("shape", [(1,), (7,), (2, 3), (0,)])
@pytest.mark.parametrize("by", ["value", "abs"])
def test_a_block_is_its_dense_self(by, shape):
    block, x = Block(by, torch.float64), torch.randn(*shape, D_IN, dtype=torch.float64)
    out, expected = block(x), block.dense(x)
    assert out.shape == (*shape, D_OUT)
    assert_close(out, expected)
    assert_close(gradients(block, out), gradients(block, expected))


def test_under_autocast():
    block, x = Block(), torch.randn(64, D_IN)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = block(x), block.dense(x)
    assert out.dtype == expected.dtype == torch.bfloat16
    exact = block.double().dense(x.double())
    assert (out - exact).abs().max() <= 2 * (expected - exact).abs().max()
    block.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(g.dtype == torch.float32 for g in gradients(block, block(x)))


def test_what_it_refuses():
    with pytest.raises(ValueError, match="k must be"):
        TopKLinear(D_IN, D_SAE, D_SAE + 1)
    layer = TopKLinear(D_IN, D_SAE, K)
    with pytest.raises(ValueError, match=r"x must end in d_in = 6, got shape \[2, 7\]"):
        layer(torch.randn(2, 7))
    with pytest.raises(ValueError, match="one dtype"):
        layer(torch.randn(2, D_IN).double())
    with pytest.raises(ValueError, match="d_sae = 39 latents, got 40"):
        CodesLinear(39, D_OUT)(layer(torch.randn(2, D_IN)))
