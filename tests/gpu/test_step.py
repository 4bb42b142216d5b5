"""What only a GPU can show of a step: that it never waits, and that any device will do."""

import pytest
import torch

from fastsae import SAE, TopK
from fastsae.losses import Objective
from fastsae.train.graph import CapturedStep
from fastsae.train.optim import Adam, Optimizer
from fastsae.train.step import fused_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
D_IN, D_SAE, K = 256, 8192, 16


def take_steps(
    device: str, shadows: tuple[str, ...], k_aux: int = 128, steps: int = 3
) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    sae = SAE(D_IN, D_SAE, TopK(K)).to(device)
    adam = Adam(sae, shadows=shadows)
    dead = torch.arange(0, D_SAE, 5, device=device)
    x = torch.randn(steps, 512, D_IN).to(device)
    torch.use_deterministic_algorithms(False)
    torch.cuda.set_sync_debug_mode("error" if steps > 1 else "default")
    try:
        for batch in x:
            adam.begin_step(1e-3)
            fused_step(sae, adam, batch, dead, Objective(k_aux=k_aux))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {name: t.cpu() for name, t in sae.state_dict().items()}


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("k_aux", [128, 1200])
@pytest.mark.parametrize("shadows", [(), ("W_enc", "W_dec")], ids=["fp32", "bf16"])
def test_a_step_never_waits_for_the_gpu(shadows, k_aux):
    """With more dead latents than k_aux, few or many."""
    take_steps("cuda", shadows, k_aux, steps=1)  # compiles the kernels, which may wait
    one, two = (take_steps("cuda", shadows, k_aux) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("window", [1, 8])
def test_a_captured_step_is_the_eager_one(window):
    """To the bit over 20 steps, with another rate at each, among them batches of another size."""
    found = []
    for captured in (False, True):
        torch.manual_seed(0)
        sae = SAE(D_IN, D_SAE, TopK(K)).cuda()
        settings = Optimizer(adam_window=window, adam_moments="bf16")
        adam = Adam(sae, settings, shadows=("W_enc", "W_dec"))
        step = CapturedStep(sae, adam, Objective(), required=True)
        losses = []
        for n, batch in enumerate(torch.randn(20, 512, D_IN).cuda()):
            adam.begin_step(1e-3 / (n + 1))
            take = step if captured else step.eager
            losses.append(take(batch[: 100 if n == 10 else 512]).loss.clone())
        assert (step.x is not None) == captured
        found.append([*losses, *sae.state_dict().values(), *adam.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_run_where_their_tensors_are():
    one, two = (take_steps(f"cuda:{n}", (), steps=1) for n in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
