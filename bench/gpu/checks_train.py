"""Checks of Adam from sparse gradients and of the training step, against plain PyTorch."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from bench.dense import DenseTopK, dense_adam, dense_step
from fastsae import SAE, TopK
from fastsae.losses import Objective
from fastsae.train.optim import Adam, Optimizer
from fastsae.train.step import autograd_step, fused_step
from fastsae_kernels.adam import AdamStep, RowGradients, Rows, Window, adam_, settle_
from fastsae_kernels.latent_major import latent_major
from fastsae_kernels.sparse import scatter_outer_reference

from .checks import Check, bf16, fp32, label
from .data import Problem

LR = 1e-2
SHADOWS = "W_enc", "W_dec"


def batches(p: Problem, steps: int, dtype: torch.dtype) -> Iterator[tuple[Tensor, ...]]:
    """Codes of which latent 0 is in every token, 1 in one, in the first step, and 2 in none; data.

    Drawn on the CPU, so that every dtype and device sees the same.
    """
    generator = torch.Generator().manual_seed(torch.initial_seed() + 1)
    for step in range(steps):
        indices = torch.randint(3, p.F, (p.N, p.K), generator=generator)
        indices[:, 0] = 0
        if step == 0:
            indices[7, 1] = 1
        values, d_values = torch.randn(2, p.N, p.K, generator=generator)
        error, x = torch.randn(2, p.N, p.D, generator=generator)
        tensors = (t.to(p.device, dtype) for t in (values, d_values, error, x))
        yield indices.to(p.device), *tensors


def start(p: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(torch.initial_seed() + 2)
    W_dec, W_enc = torch.randn(2, p.F, p.D, generator=generator, dtype=torch.float64)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    return W_dec.to(p.device, dtype), W_enc.to(p.device, dtype)


def train(
    p: Problem, steps: int, moments: torch.dtype | None = None, T: int = 1, dtype=fp32
) -> tuple[Rows, Rows]:
    """Both weights after so many steps of adam_."""
    decoder, encoder = (
        Rows(
            W, torch.zeros_like(W, dtype=moments), torch.zeros_like(W, dtype=moments), W.bfloat16()
        )
        for W in start(p, dtype)
    )
    window = None
    if T > 1:
        updated = torch.zeros(p.F, dtype=torch.int32, device=p.device)
        window = Window(updated, torch.zeros(T, dtype=dtype, device=p.device))
    at = AdamStep(0, 0.0)
    for step, (indices, values, d_values, error, x) in enumerate(batches(p, steps, dtype), 1):
        runs = latent_major(indices, p.F, values != 0)
        v, d_v = (t.flatten()[runs.entry] for t in (values, d_values))
        at = AdamStep(step, LR / step**0.5)
        adam_(decoder, encoder, RowGradients(runs, v, error, d_v, x), at, window)
    if window is not None:
        settle_(decoder, encoder, at, window)
    return decoder, encoder


def train_dense(p: Problem, steps: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same with torch.optim.Adam on dense gradients."""
    W_dec, W_enc = (W.requires_grad_() for W in start(p, dtype))
    adam = torch.optim.Adam([W_dec, W_enc], eps=6.25e-10)
    for step, (indices, values, d_values, error, x) in enumerate(batches(p, steps, dtype), 1):
        d_dec = scatter_outer_reference(values, indices, error, p.F)
        W_enc.grad = scatter_outer_reference(d_values, indices, x, p.F)
        with torch.no_grad():
            W_dec.grad = d_dec - (d_dec * W_dec).sum(1, keepdim=True) * W_dec
            adam.param_groups[0]["lr"] = LR / step**0.5
            adam.step()
            W_dec /= W_dec.norm(dim=1, keepdim=True)
    return W_dec.detach(), W_enc.detach()


def adam_check(p: Problem, steps: int) -> None:
    """The error is at most twice that of torch.optim.Adam in float32."""
    same, exact = (train_dense(p, steps, dtype) for dtype in (fp32, torch.float64))
    for state, s, e in zip(train(p, steps), same, exact, strict=True):
        error, allowed = (state.weight - e).abs().max(), (s - e).abs().max()
        rounding = torch.finfo(fp32).eps * e.abs().max()
        assert error <= 2 * allowed + rounding, f"error {error:.1e} > 2 * {allowed:.1e}"
        assert state.shadow is not None
        gap = (state.shadow.float() - state.weight.bfloat16().float()).abs()
        # Triton's interpreter drops bits where a GPU rounds to the nearest.
        assert (gap <= (state.weight.abs() * 2**-7 if p.rehearsal else 0.0)).all(), "stale shadow"


def adam_options_check(p: Problem, moments: torch.dtype | None, T: int) -> None:
    """Other moments and a window change weights by less than a step; the same bits twice."""
    steps = 3 if p.rehearsal else 9
    runs = train(p, steps, moments, T), train(p, steps, moments, T), train(p, steps)
    for state, twin, plain in zip(*runs, strict=True):
        assert all(torch.equal(getattr(state, n), getattr(twin, n)) for n in state._fields)
        assert state.first.dtype == (moments or fp32)
        deviation = (state.weight - plain.weight).abs().max()
        assert deviation < LR / 2, f"deviation {deviation:.1e}"


def adam_window_check(p: Problem, T: int) -> None:
    """A window is what the torch path makes of it in float64."""
    cpu = p._replace(device=torch.device("cpu"))
    steps = 4 if p.rehearsal else 9
    runs = train(p, steps, None, T), train(cpu, steps, None, T, torch.float64)
    same, exact = (train_dense(cpu, steps, dtype) for dtype in (fp32, torch.float64))
    for state, expected, s, e in zip(*runs, same, exact, strict=True):
        error, allowed = (state.weight.cpu() - expected.weight).abs().max(), (s - e).abs().max()
        rounding = torch.finfo(fp32).eps * e.abs().max()
        assert error <= 2 * allowed + rounding, f"error {error:.1e} > 2 * {allowed:.1e}"


def adam_far_check(p: Problem) -> None:
    """Rows beyond 2^31 entries get the update that they get alone."""
    F = 70 if p.rehearsal else (1 << 31) // p.D + 64
    near = p._replace(F=64, N=9 if p.rehearsal else 40)
    indices, values, d_values, error, x = next(batches(near, 1, fp32))
    weights = start(near, fp32)
    results = []
    for size in (64, F):
        decoder, encoder = (padded(W, size) for W in weights)
        runs = latent_major(indices + size - 64, size)
        v, d_v = (t.flatten()[runs.entry] for t in (values, d_values))
        adam_(decoder, encoder, RowGradients(runs, v, error, d_v, x), AdamStep(1, LR))
        for state in (decoder, encoder):
            assert (state.weight[:-64, 0] == 1).all(), "a row without a gradient moved"
            results.append(state.weight[-64:].clone())
        del decoder, encoder, state
    for one, two in zip(results[:2], results[2:], strict=True):
        assert torch.equal(one, two)


def padded(W: Tensor, F: int) -> Rows:
    """W behind so many rows, each with a 1, that there are F."""
    whole = W.new_zeros(F, W.shape[1])
    whole[:, 0] = 1.0
    whole[-len(W) :] = W
    return Rows(whole, *(torch.zeros_like(whole, dtype=bf16) for _ in range(2)))


# --- the step -------------------------------------------------------------------------------


def small_sae(p: Problem) -> SAE:
    sae = SAE(p.D, p.F, TopK(p.K))
    with torch.no_grad():
        sae.b_enc.normal_(std=0.1)
        sae.b_dec.normal_()
    return sae.to(p.device)


def dead_latents(p: Problem) -> Tensor:
    return torch.arange(0, p.F, 5, device=p.device)


def gradients(take: Callable, sae: SAE, p: Problem, dead: Tensor | None, x: Tensor):
    """Loss, and Adam's first moments after a step: a tenth of the gradients."""
    model = copy.deepcopy(sae).to(x.dtype)
    adam = Adam(model)
    adam.begin_step(1e-3)
    result = take(model, adam, x, dead, Objective())
    return {"loss": result.loss, **adam.first}


def step_check(p: Problem, some_dead: bool) -> None:
    """The fused step's gradients err at most twice as much as those of autograd, in norm."""
    sae, x = small_sae(p), p.normal(p.N, p.D)
    dead = dead_latents(p) if some_dead else None
    exact = gradients(autograd_step, sae, p, dead, x.double())
    same = gradients(autograd_step, sae, p, dead, x)
    for name, got in gradients(fused_step, sae, p, dead, x).items():
        error, allowed = ((t - exact[name]).norm() for t in (got, same[name]))
        rounding = torch.finfo(fp32).eps * exact[name].norm()
        assert error <= 2 * allowed + rounding, f"{name}: {error:.1e} > 2 * {allowed:.1e}"


def updates(take: Callable[[SAE, Tensor], object], sae: SAE, x: Tensor) -> dict[str, Tensor]:
    """What a step adds to each parameter."""
    model = copy.deepcopy(sae).to(x.dtype)
    take(model, x)
    before = dict(sae.named_parameters())
    return {name: (p - before[name]).detach() for name, p in model.named_parameters()}


def low_step_check(p: Problem, some_dead: bool) -> None:
    """The step that is timed, its products in bf16: its update errs at most twice as much as that
    of dense PyTorch with products in bf16, in norm.

    Adam's first step is a sign: four of them may differ from the exact ones in any case.
    """
    sae, x = small_sae(p), p.normal(p.N, p.D)
    dead = dead_latents(p) if some_dead else None
    mask = None if dead is None else torch.zeros(p.F, dtype=torch.bool, device=p.device)
    if mask is not None:
        mask[dead] = True

    def ours(model: SAE, x: Tensor) -> None:
        adam = Adam(model, shadows=SHADOWS)
        adam.begin_step(LR)
        fused_step(model, adam, x, dead, Objective())

    def theirs(model: SAE, x: Tensor) -> None:
        dense = DenseTopK(model)
        dense_step(dense, dense_adam(dense, LR), x, mask, p.D // 2, low=x.dtype == fp32)
        model.load_state_dict(dense.state_dict())

    exact, same = updates(theirs, sae, x.double()), updates(theirs, sae, x)
    for name, got in updates(ours, sae, x).items():
        error, allowed = ((t - exact[name]).norm() for t in (got, same[name]))
        signs = 2 * LR * 4**0.5
        assert error <= 2 * allowed + signs, f"{name}: {error:.1e} > 2 * {allowed:.1e}"


def same_bits_check(p: Problem) -> None:
    torch.use_deterministic_algorithms(False)  # the step alone has to see to that
    sae, x, dead, states = small_sae(p), p.normal(p.N, p.D), dead_latents(p), []
    for _ in range(2):
        model = copy.deepcopy(sae)
        adam = Adam(model, Optimizer(adam_moments="bf16", adam_window=4), shadows=SHADOWS)
        for _ in range(3):
            adam.begin_step(1e-2)
            fused_step(model, adam, x, dead, Objective())
        states.append({**model.state_dict(), **adam.state_dict()})
    differing = [name for name in states[0] if not torch.equal(states[0][name], states[1][name])]
    assert not differing, f"{differing} differ"


def no_wait_check(p: Problem) -> None:
    """Nothing in a step with dead latents waits for the GPU."""
    torch.use_deterministic_algorithms(False)  # some of torch's deterministic operators wait
    sae, x, dead = small_sae(p), p.normal(p.N, p.D), dead_latents(p)
    for options in (Optimizer(), Optimizer(adam_moments="bf16", adam_window=8)):
        model = copy.deepcopy(sae)
        adam = Adam(model, options, shadows=SHADOWS)
        for mode in ("default", "error"):  # the first step compiles
            if not p.rehearsal:
                torch.cuda.set_sync_debug_mode(mode)
            try:
                adam.begin_step(1e-3)
                fused_step(model, adam, x, dead, Objective())
            finally:
                if not p.rehearsal:
                    torch.cuda.set_sync_debug_mode("default")


def adam_checks(problems: list[Problem]) -> Iterator[Check]:
    p = Problem("", 12 if problems[0].rehearsal else 140, 20, 8, 2, problems[0].device)
    steps = 3 if p.rehearsal else 50
    yield Check("adam", label(p, f"adam {steps} steps"), partial(adam_check, p, steps))
    options = {"bf16 moments": (bf16, 1), "window 2": (None, 2), "window 8": (None, 8)}
    for name, (moments, T) in options.items():
        run = partial(adam_options_check, p, moments, T)
        yield Check("adam", label(p, "adam", name), run)
    run = partial(adam_window_check, p, 3)
    yield Check("adam", label(p, "adam window 3 against torch"), run)
    for real in problems:
        some = real._replace(N=9 if real.rehearsal else 160, F=16, K=2)
        yield Check("adam", label(some, "adam"), partial(adam_check, some, 3))
    widest = max(problems, key=lambda p: p.D)
    yield Check("adam", label(widest, "adam beyond 2^31 entries"), partial(adam_far_check, widest))


def step_checks(problems: list[Problem]) -> Iterator[Check]:
    sizes = (9, 8, 24, 2) if problems[0].rehearsal else (300, 64, 512, 8)
    p = Problem("", *sizes, problems[0].device)
    for name, dead in {"": False, "dead latents": True}.items():
        yield Check("step", label(p, "step against autograd", name), partial(step_check, p, dead))
        for q in [p, *(real.of(N=256, F=16 * real.K) for real in problems)]:
            run = partial(low_step_check, q, dead)
            yield Check("step", label(q, "bf16 step against dense", name), run)
    yield Check("step", label(p, "step twice, the same bits"), partial(same_bits_check, p))
    yield Check("wait", label(p, "step without waiting for the GPU"), partial(no_wait_check, p))


def train_checks(problems: list[Problem]) -> Iterator[Check]:
    for check in chain(adam_checks(problems), step_checks(problems)):
        yield check._replace(first=True)
