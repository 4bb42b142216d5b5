"""Both ways of taking a step, and Adam, against plain PyTorch."""

import copy
import sys

import pytest
import torch

from fastsae import SAE, AbsTopK, TopK
from fastsae.losses import Objective, auxk, training_loss
from fastsae.train.optim import Adam, Optimizer, default_lr, schedule
from fastsae.train.step import autograd_step, candidate_recall, fused_step, operands_of
from fastsae_kernels import _launch, loss, sparse
from fastsae_kernels import adam as adam_module
from fastsae_kernels._launch import INTERPRET, interpreted
from fastsae_kernels.dense_adam import AdamStep, normalize_rows_, scalars_of
from fastsae_kernels.float8 import quantize_rows

D_IN, D_SAE, K, K_AUX = 12, 70, 4, 6
DEAD = {"none": lambda: None, "some": lambda: torch.arange(0, D_SAE, 5)}


@pytest.fixture(params=[TopK(K), AbsTopK(K)], ids=["topk", "abstopk"])
def sae(request):
    sae = SAE(D_IN, D_SAE, request.param).double()
    with torch.no_grad():
        sae.b_enc.normal_(std=0.1)
        sae.b_dec.normal_()
        sae.b_enc[:3] = -100.0  # latents that never fire
        sae.b_enc[3] = 0 if request.param.signed else 5.0  # and one that always does
    return sae


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks and chunks that split this small problem as large ones are split."""
    monkeypatch.setattr(adam_module, "BLOCK_BYTES", 16 * D_IN * 8)
    monkeypatch.setattr(auxk, "AUX_BYTES", 7 * 14 * 8)


def torch_adam_steps(sae, batches, dead, objective, lr):
    """The recipe with torch.optim.Adam on dense gradients."""
    adam = torch.optim.Adam(sae.parameters(), lr=lr, eps=6.25e-10)
    for x in batches:
        adam.zero_grad()
        training_loss(sae, x, dead, objective).loss.backward()
        W = sae.W_dec.detach()
        sae.W_dec.grad -= (sae.W_dec.grad * W).sum(1, keepdim=True) * W
        adam.step()
        normalize_rows_(sae.W_dec.data)


@pytest.mark.parametrize("dead", DEAD)
@pytest.mark.parametrize("take", [autograd_step, fused_step])
def test_fifty_steps_equal_torch_adam(sae, dead, take, small_blocks):
    objective = Objective(k_aux=K_AUX)
    batches = [torch.randn(33, D_IN, dtype=torch.float64) for _ in range(50)]
    expected = copy.deepcopy(sae)
    torch_adam_steps(expected, batches, DEAD[dead](), objective, lr=1e-2)
    adam = Adam(sae)
    for x in batches:
        adam.begin_step(1e-2)
        take(sae, adam, x, DEAD[dead](), objective)
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(
            parameter, expected.get_parameter(name), rtol=1e-9, atol=1e-9, msg=name
        )


def test_both_steps_agree_with_a_second_moment_per_row(sae):
    """With the same updates of every parameter, those of the biases being plain Adam's."""
    ways = {autograd_step: copy.deepcopy(sae), fused_step: sae}
    for take, one in ways.items():
        adam = Adam(one, Optimizer(adam_second="row"))
        assert adam.second["W_enc"].shape == (D_SAE, 1) and adam.second["b_enc"].shape == (D_SAE,)
        for x in torch.randn(5, 33, D_IN, dtype=torch.float64, generator=torch.manual_seed(0)):
            adam.begin_step(1e-2)
            take(one, adam, x, DEAD["some"](), Objective(k_aux=K_AUX))
    for name, parameter in ways[autograd_step].named_parameters():
        torch.testing.assert_close(parameter, sae.get_parameter(name), msg=name)


@pytest.mark.parametrize("dead", DEAD)
@pytest.mark.parametrize("error", ["fvu", "log_fvu"])
def test_both_ways_report_the_same(sae, dead, error):
    x, results = torch.randn(40, D_IN, dtype=torch.float64), []
    for take in (autograd_step, fused_step):
        model = copy.deepcopy(sae)
        adam = Adam(model)
        adam.begin_step(1e-3)
        objective = Objective(error=error, k_aux=K_AUX)
        results.append(take(model, adam, x, DEAD[dead](), objective))
    for a, b in zip(results[0][:4], results[1][:4], strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(results[0].codes.indices, results[1].codes.indices)


@pytest.mark.parametrize("window", [1, 3])
def test_the_shadows_follow_the_weights(sae, window):
    sae = sae.float()
    options = Optimizer(adam_window=window)
    adam = Adam(sae, options, shadows=("W_enc", "W_dec"), quantized="fp8")
    for _ in range(4):
        adam.begin_step(1e-2)
        fused_step(sae, adam, torch.randn(40, D_IN), None, Objective())
        check_shadows(sae, adam)
    adam.flush()
    check_shadows(sae, adam)


def check_shadows(sae: SAE, adam: Adam) -> None:
    """Bit for bit what a restored run makes from the weights."""
    for name, shadow in adam.shadow.items():
        assert torch.equal(shadow, sae.get_parameter(name).detach().bfloat16())
    assert adam.quantized is not None
    for got, expected in zip(adam.quantized, quantize_rows(sae.W_enc.detach()), strict=True):
        assert torch.equal(got.float(), expected.float())


def test_the_same_step_gives_the_same_bits(sae):
    sae, x = sae.float(), torch.randn(100, D_IN)
    weights = []
    for _ in range(2):
        model = copy.deepcopy(sae)
        adam = Adam(model)
        for _ in range(3):
            adam.begin_step(1e-2)
            fused_step(model, adam, x, DEAD["some"](), Objective(k_aux=K_AUX))
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("shadows", [(), ("W_enc", "W_dec")])
@pytest.mark.skipif(not INTERPRET, reason="a GPU's own check is in tests/gpu")
@pytest.mark.usefixtures("fast_interpreter")
def test_no_value_is_read_back(sae, shadows, monkeypatch):
    """With kernels in place of the torch paths, no operator of a step looks at a result."""
    for module in (sparse, loss):  # looks at indices on a CPU only
        monkeypatch.setattr(module, "check_indices", lambda indices, F: None)
    sae, dead = sae.float(), DEAD["some"]()
    adam = Adam(sae, shadows=shadows)
    adam.begin_step(1e-2)
    with interpreted(), torch.profiler.profile() as profiler:
        fused_step(sae, adam, torch.randn(20, D_IN), dead, Objective(k_aux=K_AUX))
    events = profiler.events()
    assert events is not None
    assert "fastsae::squared_error" in {event.name for event in events}
    reading = ("aten::item", "aten::nonzero", "aten::masked_select", "aten::equal")
    callers = [event.cpu_parent for event in events if event.name in reading]
    # torch's Adam reads its step counter, on a CPU only.
    assert {caller and caller.name for caller in callers} <= {"aten::_fused_adam_"}


@pytest.mark.skipif(not INTERPRET, reason="a GPU's own check is in tests/gpu")
@pytest.mark.usefixtures("fast_interpreter")
def test_no_launch_changes_from_step_to_step(sae, monkeypatch):
    """But in what its tensors hold: a CUDA graph of one step is one of all."""
    launches: list[tuple] = []

    def launch(kernel, grid, *arguments, **options):
        plain = [(a.shape, a.dtype) if isinstance(a, torch.Tensor) else a for a in arguments]
        launches.append((kernel.__name__, grid, plain, options))
        _launch.launch(kernel, grid, *arguments, **options)

    for name, module in list(sys.modules.items()):
        if name.startswith("fastsae_kernels._") and name.endswith("_kernel"):
            monkeypatch.setattr(module, "launch", launch)
    small = Optimizer(adam_moments="bf16", adam_window=3)
    sae, options = sae.float(), small if sae.activation.signed else Optimizer()
    adam = Adam(sae, options)
    adam.at = adam.at._replace(scalars=scalars_of(AdamStep(1, 0.0)))  # as on a GPU
    x, steps = torch.randn(3, 5, D_IN), []
    for n in range(3):
        adam.begin_step(1e-2 / (n + 1))
        scalars = adam.at.scalars
        with interpreted():
            fused_step(sae, adam, x[n], None, Objective())
        assert adam.at.scalars is scalars
        steps.append(launches.copy())
        launches.clear()
    assert {"_adam_kernel"} <= {name for name, *_ in steps[0]}
    assert steps[0] == steps[1] == steps[2]


def test_bf16_products_err_no_more_than_a_bf16_model(sae):
    """At most twice as much as the same loss with everything in bfloat16, and one rounding."""
    sae, x, dead = sae.float(), torch.randn(200, D_IN), DEAD["some"]()
    exact = training_loss(copy.deepcopy(sae).double(), x.double(), dead, Objective(k_aux=K_AUX))
    same = training_loss(copy.deepcopy(sae).bfloat16(), x.bfloat16(), dead, Objective(k_aux=K_AUX))
    adam = Adam(sae, shadows=("W_enc", "W_dec"))
    adam.begin_step(1e-3)
    low = fused_step(sae, adam, x, dead, Objective(k_aux=K_AUX))
    for got, s, e in zip(low[:4], same[:4], exact[:4], strict=True):
        assert got.dtype == torch.float32
        rounding = torch.finfo(torch.bfloat16).eps * e.abs()
        assert (got - e).abs() <= 2 * (s - e).abs() + rounding


def test_schedule():
    factors = [schedule(step, 100, 10, 0.2) for step in range(100)]
    assert factors[0] == 1 / 11
    assert factors[10:80] == [1.0] * 70
    assert factors[90] == 0.5
    assert factors[-1] == 1 / 20
    assert schedule(0, 100, 0, 0.0) == 1
    assert default_lr(2**14, 50_000, 1024) == 2e-4
    assert default_lr(2**12, 10**6, 4096) == 4e-4
    assert default_lr(2**12, 600, 4096) == 2e-3
    assert default_lr(2**12, 600, 256) == 1e-3


def test_float32_fvu_at_a_real_size():
    """FVU of a [4096, 512] batch is as exact as its float64 formula allows."""
    x = torch.randn(4096, 512) + 1
    sae = SAE(512, 1024, TopK(8))
    exact = training_loss(copy.deepcopy(sae).double(), x.double()).fvu
    adam = Adam(sae)
    adam.begin_step(1e-3)
    fvu = fused_step(sae, adam, x, None, Objective()).fvu
    torch.testing.assert_close(fvu.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("quantized", ["int8", "fp8"])
def test_recall_counts_what_the_candidates_lack(quantized):
    """The candidates of a spoiled copy lack the latents whose rows it has lost, and no others."""
    sae = SAE(D_IN, D_SAE, TopK(K))
    x = torch.randn(50, D_IN)
    shadows = ["W_enc", "W_dec"] if quantized == "fp8" else []
    adam = Adam(sae, quantized=quantized, shadows=shadows)
    assert candidate_recall(sae, adam, x) == {"candidate_recall": 1}
    assert candidate_recall(sae, Adam(sae), x) == {}
    lost = sae.encode(x).latents()[0, 0]
    operands, shadow = operands_of(sae, adam)
    assert isinstance(shadow, tuple)
    shadow.rows[lost] = 0
    exact = sae.activation.encode(sae.center(x).to(operands.W_enc.dtype), operands)
    active = exact.values != 0
    missed = ((exact.latents() == lost) & active).sum() / active.sum()
    assert missed > 0
    assert candidate_recall(sae, adam, x) == {"candidate_recall": pytest.approx(float(1 - missed))}
