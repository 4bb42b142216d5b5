"""Dense tensors with codes attached, against plain dense autograd."""

import pytest
import torch
import torch.nn.modules.module as every
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import linear

from fastsae.codes import Codes
from fastsae.dropin import dense
from fastsae.dropin.dense import (
    AboveThreshold,
    Encoder,
    few_latents,
    has_hooks,
    lookup,
    to_dense,
    worth_accelerating,
)
from fastsae_kernels.testing import assert_no_worse

N, D, F = 9, 5, 24


def encoder(dtype=torch.float64) -> Encoder:
    shapes = (N, D), (F, D), (F,)
    return Encoder(*(torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes))


def pre_activations(*arguments):
    return Encoder(*arguments).pre_activations()


@pytest.mark.parametrize("latents", [range(0), range(3, 5), range(F)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pre_activations(latents, dtype):
    def some_of(op):
        return lambda *arguments: op(*arguments)[:, list(latents)]

    assert_no_worse(some_of(pre_activations), some_of(linear), *encoder(dtype))


def test_pre_activations_are_whole():
    assert_no_worse(pre_activations, linear, *encoder(torch.float32))


def test_pre_activations_twice():
    """Also where a latent's gradient is 0, but has a derivative."""
    g = torch.randn(N, F, dtype=torch.float64) * (torch.arange(F) < 2)
    assert gradgradcheck(pre_activations, encoder(), g.requires_grad_(), fast_mode=True)


def test_entries():
    indices = torch.randint(F, (N, 4))
    expected = linear(*(e := encoder())).gather(1, indices)
    assert torch.equal(e.gather(linear(*e), indices), expected)
    assert gradcheck(lambda *e: Encoder(*e).gather(linear(*e), indices), (*e,))


@pytest.mark.parametrize("total", [0, 1, 30, N * F])
def test_largest_of_batch(total):
    pre = linear(*(e := encoder()))
    dense = e.batch_topk(pre, total).to_dense()
    least = pre.flatten().sort(descending=True).values[max(total - 1, 0)].clamp(min=0)
    expected = pre * ((pre >= least) & (pre > 0) & (total > 0))
    assert torch.equal(dense, expected)
    g = torch.randn_like(dense)
    got, wanted = (torch.autograd.grad(d, e, g) for d in (dense, expected))
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("widest", [0.0, 1.0])
@pytest.mark.parametrize("threshold", [-10.0, 2.0, 100.0])
def test_above(threshold, widest):
    def sparse(*encoder):
        pre = pre_activations(*encoder)
        found = Encoder(*encoder).above(pre, torch.full((F,), threshold, dtype=pre.dtype), widest)
        return found.codes(found.pre).to_dense()

    def plain(*encoder):
        pre = linear(*encoder)
        return pre * (pre > threshold)

    assert_no_worse(sparse, plain, *encoder(torch.float32))


def test_a_dense_tensor_knows_its_codes_until_it_is_written_into():
    codes = Codes(torch.rand(6, 2) + 1, torch.tensor([[1, 3]] * 6), F)
    dense = to_dense(codes, (2, 3, F))
    assert dense.shape == (2, 3, F) and lookup(dense, Codes) is codes
    assert lookup(dense.clone(), Codes) is None and lookup(dense.detach(), Codes) is None
    dense[0, 0, 0] = 1
    assert lookup(dense, Codes) is None
    with torch.inference_mode():
        assert lookup(to_dense(codes, (6, F)), Codes) is None


def test_dense_is_judged_by_the_token_with_the_most_active_latents():
    """Among those that are looked at, whose number is limited."""
    x, W_enc, b_enc = torch.zeros(1000, D), torch.ones(F, D), torch.zeros(F)
    assert not Encoder(x, W_enc, b_enc).is_dense(0.0, 0.0)
    assert not Encoder(x[:0], W_enc, b_enc).is_dense(-1.0, 0.0)
    assert Encoder(x, W_enc, b_enc).is_dense(-1.0, 0.9)
    threshold = torch.arange(F) - 1.5  # two latents exceed it
    assert Encoder(x, W_enc, b_enc).is_dense(threshold, 1.9 / F)
    assert not Encoder(x, W_enc, b_enc).is_dense(threshold, 2.1 / F)
    x[: dense.SAMPLE] = 1
    assert Encoder(x, W_enc, b_enc).is_dense(0.0, 0.9)


def test_limits_depend_on_the_processor_the_gradient_and_the_class(monkeypatch):
    class Some(AboveThreshold):
        inference_part = 0.5

    some, x = Some(), torch.empty(0)
    for intel, limits in {True: dense.INTEL_LIMITS, False: dense.LIMITS}.items():
        monkeypatch.setattr(dense, "INTEL", intel)
        assert some.limits(x) == limits
        with torch.no_grad():
            assert some.limits(x) == (limits.active / 2, limits.widest / 2)
        assert some.limits(x.to("meta")) == dense.LIMITS


def test_hooks_of_a_module_and_of_all_modules():
    module = torch.nn.Linear(2, 3)
    for register in (
        module.register_forward_hook,
        module.register_forward_pre_hook,
        module.register_full_backward_hook,
        every.register_module_forward_hook,
        every.register_module_forward_pre_hook,
        every.register_module_full_backward_hook,
    ):
        assert not has_hooks(module)
        hook = register(lambda *_: None)
        assert has_hooks(torch.nn.Identity(), module)
        hook.remove()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_no_sparse_ops_where_sizes_cannot_depend_on_data():
    found = []

    def f(x):
        found.append(worth_accelerating(x))
        return x

    x = torch.randn(3, dense.MIN_TOKENS + 1, D)
    for case in (x[:1], x[0, 1:], x.to("meta")):
        f(case)
    torch.func.vmap(f)(x)
    torch.func.jvp(f, (x,), (x,))
    torch.jit.trace(f, x, check_trace=False)
    with torch.autocast("cpu", torch.bfloat16):
        f(x)
    assert found == [True] + [False] * 6


@pytest.mark.parametrize("latents", [[], [3], range(F)])
def test_few_latents(latents):
    g = torch.zeros(200, F)
    g[-1, list(latents)] = 1.0
    with torch.no_grad():
        found = few_latents(g)
    assert (None if found is None else found.tolist()) == (None if len(latents) == F else latents)


def by_library(some: AboveThreshold, batch: Encoder) -> bool:
    return some.stays_dense() or some.is_dense(batch)


def test_after_a_dense_batch_the_library_runs_for_a_while():
    """Then the batches are looked at again; after one with outliers it takes longer."""
    some = AboveThreshold()
    few, many = (Encoder(torch.ones(4, D), torch.ones(F, D), bias) for bias in biases())
    assert not by_library(some, few)
    assert by_library(some, many)
    assert [by_library(some, few) for _ in range(dense.DENSE_BATCHES)].count(True) == (
        dense.DENSE_BATCHES - 1
    )
    some.codes(many)
    later = [by_library(some, few) for _ in range(2 * dense.AFTER_OUTLIERS)]
    assert later.count(True) == dense.AFTER_OUTLIERS and not later[-1]


def test_an_evaluation_does_not_change_which_code_training_runs():
    def training(evaluated: bool) -> list[bool]:
        some, found = AboveThreshold(), []
        for batch in (few, many, few, few, few, many):
            found.append(by_library(some, batch))
            if evaluated:
                with torch.no_grad():
                    assert by_library(some, many)
                    some.codes(many)
        return found

    few, many = (Encoder(torch.ones(4, D), torch.ones(F, D), bias) for bias in biases())
    assert training(True) == training(False) == [False, *[True] * 5]


def biases() -> tuple[torch.Tensor, torch.Tensor]:
    """With which no latent is active for tokens of ones, and with which all are."""
    return torch.full((F,), -D - 1.0), torch.zeros(F)
