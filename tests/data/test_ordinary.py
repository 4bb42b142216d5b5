"""What ordinary tokens are like does not depend on a few extreme ones."""

import math

import pytest
import torch

from fastsae.data.ordinary import Ordinary

N, D = 3000, 24


@pytest.mark.parametrize("ratio", [30, 1000, 1e6])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_attention_sinks_are_found(ratio, offset):
    x = torch.randn(N, D) + offset * torch.eye(D)[3]
    x[:6] += ratio * D**0.5 * torch.eye(D)[5]
    found, without = Ordinary.of(x, 10.0), Ordinary.of(x[6:], None)
    assert found.has(x).tolist() == [False] * 6 + [True] * (N - 6)
    assert torch.equal(found.mean, without.mean) and found.spread == without.spread
    assert found.gamma == without.gamma == pytest.approx(offset / D**0.5, rel=0.02, abs=0.03)


def test_all_can_be_kept():
    x = torch.randn(N, D)
    x[7] *= 1e6
    found = Ordinary.of(x, None)
    assert found.limit == math.inf and found.has(x).all()
    torch.testing.assert_close(found.mean, x.mean(0))


def test_tokens_that_are_mostly_equal_are_all_ordinary():
    x = torch.ones(N, D)
    x[: N // 3] = torch.randn(N // 3, D)
    assert Ordinary.of(x, 10.0).has(x).all()
