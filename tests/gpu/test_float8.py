"""The GPU's fp8 GEMM beside its emulation, and a fused step with candidates from it."""

import pytest
import torch

from fastsae import SAE, TopK
from fastsae.losses import Objective
from fastsae.train.optim import Adam
from fastsae.train.step import fused_step
from fastsae_kernels import encode_topk
from fastsae_kernels.float8 import quantize_rows, scaled_product, why_not_float8

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or why_not_float8(16, 16, "cuda") is not None,
        reason="needs a GPU with fp8 GEMMs",
    ),
]
SHAPES = [(1, 16, 16), (77, 48, 208), (300, 768, 4096), (1000, 4096, 8192)]  # tokens, D, F


@pytest.mark.parametrize(("n", "D", "F"), SHAPES)
def test_rows_have_the_bits_of_a_cpu(n, D, F):
    """Also those of the scale, so that a run can be resumed elsewhere."""
    x = torch.randn(n, D) * 10 ** torch.randn(n, 1)
    for got, expected in zip(quantize_rows(x.cuda()), quantize_rows(x), strict=True):
        assert torch.equal(got.cpu().float(), expected.float())


@pytest.mark.parametrize(("n", "D", "F"), SHAPES)
def test_the_product_is_exact_where_fp8_is(n, D, F):
    """Sums that fast accumulation and bfloat16 hold."""
    x, W = torch.zeros(n, D), torch.randint(-8, 9, (F, D)).float()
    x.scatter_(1, torch.rand(n, D).topk(4).indices, 1.0)
    b = torch.randint(-8, 9, (F,)).float()
    h = scaled_product(x.cuda().bfloat16(), quantize_rows(W.cuda()), b.cuda().bfloat16())
    assert torch.equal(h.cpu().float(), torch.addmm(b, x, W.t()))


@pytest.mark.parametrize(("n", "D", "F"), SHAPES)
def test_the_product_errs_as_its_emulation(n, D, F):
    """No more than twice as far from float64 in the mean square, fast accumulation included."""
    x, W, b = torch.randn(n, D).bfloat16(), torch.randn(F, D).bfloat16(), torch.randn(F).bfloat16()
    exact = torch.addmm(b.double(), x.double(), W.double().t())
    emulated = scaled_product(x, quantize_rows(W), b)
    got = scaled_product(x.cuda(), quantize_rows(W.cuda()), b.cuda()).cpu()
    errors = [(h.double() - exact).square().mean() for h in (got, emulated)]
    assert errors[0] <= 2 * errors[1]


def test_the_kept_entries_are_those_of_the_emulation():
    x, W = torch.randn(500, 256).bfloat16(), torch.randn(4096, 256).bfloat16()
    b = torch.zeros(4096).bfloat16()
    found = [
        encode_topk(x.to(d), W.to(d), b.to(d), 32, shadow=quantize_rows(W.to(d)))
        for d in ("cuda", "cpu")
    ]
    same = (found[0][1].cpu()[:, :, None] == found[1][1][:, None]).any(2).float().mean()
    exact = torch.addmm(b.float(), x.float(), W.float().t()).topk(32).indices
    recall = [(i.cpu()[:, :, None] == exact[:, None]).any(2).float().mean() for _, i in found]
    assert same >= min(recall) and recall[0] >= 2 * recall[1] - 1


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_step_with_fp8_candidates_never_waits_and_repeats():
    torch.use_deterministic_algorithms(False)
    results = []
    for steps in (1, 3, 3):  # the first compiles the kernels, which may wait
        torch.manual_seed(0)
        sae = SAE(256, 8192, TopK(8)).cuda()
        adam = Adam(sae, shadows=("W_enc", "W_dec"), quantized="fp8")
        x, dead = torch.randn(3, 512, 256).cuda(), torch.arange(0, 8192, 5, device="cuda")
        torch.cuda.set_sync_debug_mode("error" if steps > 1 else "default")
        try:
            for batch in x[:steps]:
                adam.begin_step(1e-3)
                fused_step(sae, adam, batch, dead, Objective())
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert adam.quantized is not None
        results.append([t.cpu() for t in (*sae.state_dict().values(), adam.quantized.rows.float())])
        expected = quantize_rows(sae.W_enc.detach())
        assert torch.equal(adam.quantized.rows.float(), expected.rows.float())
        assert torch.equal(adam.quantized.scale, expected.scale)
    assert all(torch.equal(one, two) for one, two in zip(*results[1:], strict=True))
