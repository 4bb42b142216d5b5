"""Each recipe against a dense PyTorch reference of it, written from METHODS' table.

Two correct runs of one recipe differ by the order of their sums. What that does to the weights is
measured: the reference is run again from weights and on data that differ in the last bit. That
stands for one of the roundings, of which a step has about a hundred in a row.
"""

from dataclasses import dataclass, replace

import jaxtyping
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from fastsae import SAE, TopK
from fastsae.data import Batch, Cursor
from fastsae.data.ordinary import Ordinary
from fastsae.losses import Objective
from fastsae.nn import Init, TopKConfig, geometric_median, init_from_data
from fastsae.train import TrainConfig
from fastsae.train.optim import Adam, Optimizer, align_rows_, clip_, schedule
from fastsae.train.plan import Plan
from fastsae.train.recipes import RECIPES, recipe
from fastsae.train.standardization import Standardization
from fastsae.train.state import TrainState
from fastsae.train.step import autograd_step, fused_step

D, F, K, N = 16, 64, 4, 40
TOTAL, DEAD_STEPS = 5000, 2
STEPS = [*range(990, 1000), *range(4990, 5000)]
"""Those that are run: before a warm-up of 1000 ends, and at the end of a decay."""
RARE = range(12)
"""Latents that hardly ever fire, more than aux-k takes."""
ROUNDINGS = 100


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A row of METHODS' table."""

    row_norm: float = 1.0
    linear: bool = False
    center: str = "median"
    relative: bool
    by_norm: bool = False
    lr: float = 2e-4 / (F / 2**14) ** 0.5
    eps: float = 1e-8
    clip: float | None = None
    warmup: int = 0
    decay: float = 0.0
    ema: float | None = None
    auxk: float = 1 / 32
    auxk_relative: bool = True
    dead_after: int | None = 10_000_000


REFERENCES = {
    "openai": Reference(relative=True, lr=1e-4, eps=6.25e-10, ema=0.999),
    "dictionary_learning": Reference(relative=False, clip=1.0, warmup=1000, decay=0.2),
    "sparsify": Reference(relative=True, linear=True, center="mean", auxk=0.0, dead_after=None),
    "sae_lens": Reference(
        relative=False, row_norm=0.1, center="zero", by_norm=True, lr=3e-4, clip=1.0,
        auxk=1.0, auxk_relative=False, dead_after=1000 * 4096,
    ),
}  # fmt: skip


def best(pre: Tensor, k: int) -> Tensor:
    top = pre.topk(k)
    return torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())


def variance(x: Tensor) -> Tensor:
    return (x - x.mean(0)).square().sum()


def dense_loss(weights: list[Tensor], x: Tensor, dead: Tensor, row: Reference) -> tuple:
    """The loss, and which latents were active."""
    W_enc, b_enc, W_dec, b_dec = weights
    norm = W_dec.norm(dim=1) if row.by_norm else torch.ones(F).double()
    pre = ((x - b_dec) @ W_enc.T + b_enc) * norm
    z = best(pre, K)
    e = x - (z / norm) @ W_dec - b_dec
    loss = e.square().sum() / variance(x) if row.relative else e.square().sum(1).mean()
    if row.auxk and dead.any():
        assert dead.sum() >= D // 2
        residual = e.detach()
        aux = best(pre.masked_fill(~dead, -torch.inf), D // 2)
        assert aux.any()
        missed = (residual - (aux / norm) @ W_dec).square().sum()
        loss = loss + row.auxk * missed / (variance(residual) if row.auxk_relative else N)
    return loss, (z != 0).any(0)


def dense_run(start: list[Tensor], batches: list[Tensor], row: Reference) -> list[Tensor]:
    """The weights that would be saved: W_enc, b_enc, W_dec, b_dec."""
    weights = [w.clone().requires_grad_() for w in start]
    W_dec, ages, seen = weights[2], torch.zeros(F), []
    adam = torch.optim.Adam(weights, eps=row.eps)
    for step, x in zip(STEPS, batches, strict=True):
        loss, fired = dense_loss(weights, x, ages >= DEAD_STEPS * N, row)
        adam.zero_grad()
        loss.backward()
        ages = (ages + N).masked_fill(fired, 0)
        unit, grad = W_dec.detach(), W_dec.grad
        assert grad is not None
        if not row.by_norm:
            grad -= (grad * unit).sum(1, keepdim=True) * unit
        if row.clip:
            assert clip_grad_norm_(weights, row.clip) > row.clip
        rise, fall = (step + 1) / (row.warmup + 1), (TOTAL - step) / max(row.decay * TOTAL, 1)
        adam.param_groups[0]["lr"] = row.lr * min(1, rise, fall)
        adam.step()
        if not row.by_norm:
            W_dec.data /= W_dec.data.norm(dim=1, keepdim=True)
        seen.append([w.detach().clone() for w in weights])
    if row.ema is None:
        return seen[-1]
    shares = row.ema ** torch.arange(len(seen) - 1, -1, -1, dtype=torch.float64)
    average = [torch.einsum("t...,t->...", torch.stack(w), shares / shares.sum())
               for w in zip(*seen, strict=True)]  # fmt: skip
    average[2] /= average[2].norm(dim=1, keepdim=True)
    return average


def last_bit(t: Tensor) -> Tensor:
    """t with its last bit changed, up or down."""
    return t * (1 + torch.finfo(t.dtype).eps * torch.randn_like(t).sign())


def weights_of(sae: SAE) -> list[Tensor]:
    return [w.detach().clone() for w in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)]


def config_of(name: str) -> TrainConfig:
    return replace(recipe(name, F), activation=TopKConfig(k=K), steps=TOTAL, device="cpu")


def initialized(config: TrainConfig) -> tuple[SAE, Tensor]:
    """The SAE where training starts, and the sample of data that decided where."""
    x = torch.randn(200, D, dtype=torch.float64) + 0.3
    x[:20] += 3  # the mean follows them, the median does not
    return init_from_data(config.build(D).double(), x, init=config.init), x


def run(sae: SAE, config: TrainConfig, batches: list[Tensor], fused: bool) -> list[Tensor]:
    plan = Plan.of(config, D, TOTAL)
    units = Standardization.of([Ordinary.of(batches[0].float(), None)])  # not applied here
    state = TrainState.fresh(sae, Adam(sae, config.optimizer), units)
    for step, x in zip(STEPS, batches, strict=True):
        factor = schedule(step, TOTAL, plan.warmup, config.optimizer.decay)
        state.adam.begin_step(plan.lr * factor)
        state.find_dead(DEAD_STEPS * N)
        take = fused_step if fused else autograd_step
        result = take(sae, state.adam, x, state.dead, config.objective)
        state.advance(result, Batch(x.float(), Cursor(), np.arange(N)))
    state.adam.flush()
    return weights_of(sae)


@pytest.mark.parametrize(
    ("name", "fused"),
    [(name, False) for name in RECIPES] + [("openai", True), ("sparsify", True)],
)
def test_twenty_steps(name, fused):
    config, row = config_of(name), REFERENCES[name]
    assert (config.needs_autograd is None) == (name in ("openai", "sparsify"))
    sae, _ = initialized(config)
    with torch.no_grad():
        sae.b_enc[RARE] = -2 * sae.W_enc[RARE].norm(dim=1)
    start = weights_of(sae)
    batches = [torch.randn(N, D, dtype=torch.float64) + 0.3 for _ in STEPS]
    expected = dense_run(start, batches, row)
    shifted = dense_run([*map(last_bit, start)], [*map(last_bit, batches)], row)
    got = run(sae, config, batches, fused)
    change, error = (
        max((a - b).abs().max() for a, b in zip(weights, expected, strict=True))
        for weights in (shifted, got)
    )
    moved = min((a - b).abs().max() for a, b in zip(start, expected, strict=True))
    assert error <= ROUNDINGS * change
    assert ROUNDINGS * change < 1e-9 * moved


@pytest.mark.parametrize("name", RECIPES)
def test_start(name):
    config, row = config_of(name), REFERENCES[name]
    sae, x = initialized(config)
    W_enc, b_enc, W_dec, b_dec = weights_of(sae)
    torch.testing.assert_close(W_dec.norm(dim=1), torch.full((F,), row.row_norm).double())
    if row.linear:
        assert 0.95 < W_enc.abs().max() * D**0.5 <= 1
        torch.testing.assert_close(W_dec, W_enc / W_enc.norm(dim=1, keepdim=True))
    else:
        assert torch.equal(W_enc, W_dec)
    assert not b_enc.any()
    centers = {"median": geometric_median(x), "mean": x.mean(0), "zero": torch.zeros(D).double()}
    assert torch.equal(b_dec, centers[row.center])


@pytest.mark.parametrize("name", RECIPES)
def test_what_counts_as_dead(name):
    config, row = config_of(name), REFERENCES[name]
    assert config.dead_after == row.dead_after


def test_an_unknown_recipe_is_refused():
    with pytest.raises(ValueError, match="recipe must be one of openai, .*, got 'gao'"):
        recipe("gao")


@pytest.mark.parametrize("d_out", [None, 9])
def test_directions_in_the_active_subspace(d_out):
    """Rows lie where the data vary: in the span of their 5 large components, not of the others."""
    sizes = torch.tensor([3.0, 2.0, 2.0, 1.0, 1.0] + [0.01] * (D - 5)).double()
    basis = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64)).Q
    x = torch.randn(500, D, dtype=torch.float64) * sizes @ basis.T + 10
    y = None if d_out is None else x @ torch.randn(D, d_out, dtype=torch.float64)
    sae = SAE(D, F, TopK(K), d_out).double()
    init_from_data(sae, x, target=y, init=Init(rows="active_subspace", row_norm=0.5))
    for rows, data in ((sae.W_enc, x), (sae.W_dec, x if y is None else y)):
        torch.testing.assert_close(rows.norm(dim=1), torch.full((F,), 0.5).double())
        leading = torch.linalg.svd(data - data.mean(0), full_matrices=False).Vh[:5]
        torch.testing.assert_close(rows @ leading.T @ leading, rows)
        assert torch.linalg.matrix_rank(rows) == 5
    assert torch.equal(sae.W_enc, sae.W_dec) == (d_out is None)


def test_aligned_rows():
    """Products are 1 after each step and in the average that is saved; rows move no more than they
    must."""
    sae = SAE(D, F, TopK(K)).double()
    adam = Adam(sae, Optimizer(constraint="aligned", ema=0.9))

    def check_products():
        products = (sae.W_enc * sae.W_dec).sum(1)
        torch.testing.assert_close(products, torch.ones(F).double())

    for _ in range(5):
        adam.begin_step(0.01)
        autograd_step(sae, adam, torch.randn(N, D, dtype=torch.float64), None, Objective())
        check_products()
    assert (sae.W_dec.norm(dim=1) - 1).abs().max() > 1e-3
    adam.flush()
    check_products()
    before = sae.W_enc.detach() + torch.randn(F, D)
    after = before.clone()
    align_rows_(after, sae.W_dec.detach())
    along = sae.W_dec * ((after - before) * sae.W_dec).sum(1, keepdim=True)
    torch.testing.assert_close(after - before, along / sae.W_dec.square().sum(1, keepdim=True))


@pytest.mark.parametrize("norm", [0.1, 1e3])
def test_clip(norm):
    """Like torch's, over all gradients together, whether or not they exceed the norm."""
    shapes = {"W_dec": (F, D), "b_enc": (F,)}
    gradients = {name: torch.randn(shape) for name, shape in shapes.items()}
    parameters = [torch.zeros(shape, requires_grad=True) for shape in shapes.values()]
    for parameter, gradient in zip(parameters, gradients.values(), strict=True):
        parameter.grad = gradient.clone()
    clip_grad_norm_(parameters, norm)
    clip_(gradients, norm)
    for parameter, gradient in zip(parameters, gradients.values(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


@pytest.mark.parametrize("settings", [{"constraint": "norm"}, {"adam_moments": "fp16"}])
def test_an_unknown_choice_is_refused(settings, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is for users
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=f"{name} must be one of .*, got '{value}'"):
        Optimizer(**settings)
