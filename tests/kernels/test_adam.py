"""Row-wise Adam from sparse codes, against torch.optim.Adam on dense gradients."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastsae_kernels import _launch
from fastsae_kernels.adam import (
    AdamStep,
    RowGradients,
    Rows,
    Window,
    adam_,
    flush_,
)
from fastsae_kernels.dense_adam import adam_reference, dense_adam_, stochastic_bf16
from fastsae_kernels.float8 import quantize_rows
from fastsae_kernels.latent_major import latent_major
from fastsae_kernels.sparse import scatter_outer_reference
from fastsae_kernels.testing import assert_no_worse

N, K, F, D = 20, 2, 8, 20
ALWAYS, ONCE, NEVER = 0, 1, 2
LR = 1e-2


def batches(steps: int, dtype=torch.float32):
    """Codes in which one latent always fires, one only in the first step, one never, with data."""
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        indices = torch.randint(3, F, (N, K), generator=generator)
        indices[:, 0] = ALWAYS
        if step == 0:
            indices[7, 1] = ONCE
        values, d_values = torch.randn(2, N, K, generator=generator)
        values[5, 1] = d_values[5, 1] = 0.0  # an inactive entry
        error, x = torch.randn(2, N, D, generator=generator)
        yield indices, *(t.to(dtype) for t in (values, d_values, error, x))


def weights(dtype=torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    W_dec, W_enc = torch.randn(2, F, D, generator=generator)
    return normalize(W_dec.double(), dim=1).to(dtype), W_enc.to(dtype)


EXTRA = torch.tensor([NEVER, 6])


def extra_gradients(dtype) -> tuple[Tensor, Tensor]:
    dec, enc = torch.linspace(-1, 1, 2 * 2 * D).view(2, 2, D).to(dtype)
    return dec, enc


def rows(W: Tensor, moments: torch.dtype | None = None, device="cpu", per_row=False) -> Rows:
    W = W.clone().to(device)
    zeros = torch.zeros_like(W, dtype=moments)
    second = torch.zeros_like(W[:, :1]) if per_row else zeros.clone()
    return Rows(W, zeros, second, W.bfloat16(), quantize_rows(W))


@contextmanager
def small_chunks() -> Iterator[None]:
    """The latent that always fires has a whole chunk of entries, and some more."""
    with pytest.MonkeyPatch.context() as patch:
        for kernel in ("adam", "latent_major"):
            patch.setattr(f"fastsae_kernels._{kernel}_kernel.CHUNK", 16)
        yield


@small_chunks()
def train(
    device, moments=None, T=1, extra=False, steps=12, dtype=torch.float32, seed=0, per_row=False
):
    """Decoder and encoder after so many steps of adam_."""
    decoder, encoder = (rows(W, moments, device, per_row) for W in weights(dtype))
    window = None
    if T > 1:
        updated = torch.zeros(F, dtype=torch.int32, device=device)
        window = Window(updated, torch.zeros(T, dtype=dtype, device=device))
    at = AdamStep(0, 0.0)
    for step, batch in enumerate(batches(steps, dtype), 1):
        indices, values, d_values, error, x = (t.to(device) for t in batch)
        runs = latent_major(indices, F, values != 0)
        more = None
        if extra:
            dec, enc = extra_gradients(dtype)
            more = EXTRA.to(device), dec.to(device), enc.to(device)
        entries = (t.flatten()[runs.entry] for t in (values, d_values))
        v, d_v = entries
        at = AdamStep(step, LR / step**0.5, seed=seed)
        adam_(decoder, encoder, RowGradients(runs, v, error, d_v, x, more), at, window)
    if window is not None:
        flush_(decoder, encoder, at, window)
    return decoder, encoder


def train_on_torch_path(**options):
    """The same without kernels, also in tests of these."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_launch._local, "interpreted", False, raising=False)
        return train("cpu", **options)


def train_dense(dtype, extra, steps) -> tuple[Tensor, Tensor]:
    """The same with torch.optim.Adam."""
    W_dec, W_enc = (W.requires_grad_() for W in weights(dtype))
    adam = torch.optim.Adam([W_dec, W_enc], eps=6.25e-10)
    for step, (indices, values, d_values, error, x) in enumerate(batches(steps, dtype), 1):
        W_dec.grad = scatter_outer_reference(values, indices, error, F)
        W_enc.grad = scatter_outer_reference(d_values, indices, x, F)
        if extra:
            for W, g in zip((W_dec, W_enc), extra_gradients(dtype), strict=True):
                assert W.grad is not None
                W.grad[EXTRA] += g
        with torch.no_grad():
            W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
            adam.param_groups[0]["lr"] = LR / step**0.5
            adam.step()
            W_dec /= W_dec.norm(dim=1, keepdim=True)
    return W_dec.detach(), W_enc.detach()


@pytest.mark.parametrize(("steps", "extra"), [(6, False), (3, True)])
def test_steps_equal_torch_adam(device, steps, extra):
    """The error is at most twice that of torch.optim.Adam in float32."""
    same, exact = (train_dense(dtype, extra, steps) for dtype in (torch.float32, torch.float64))
    for state, s, e in zip(train(device, extra=extra, steps=steps), same, exact, strict=True):
        error, allowed = (state.weight.cpu() - e).abs().max(), (s - e).abs().max()
        assert error <= 2 * allowed + torch.finfo(torch.float32).eps * e.abs().max()


@pytest.mark.parametrize("T", [1, 3])
def test_shadows_and_norms(device, T):
    for state, unit in zip(train(device, T=T, steps=T), (True, False), strict=True):
        assert state.shadow is not None and state.quantized is not None
        for got, expected in zip(state.quantized, quantize_rows(state.weight), strict=True):
            assert torch.equal(got.float(), expected.float()), "what a restored run would make"
        # Triton's interpreter drops bits where a GPU rounds to the nearest.
        ulp = state.weight.abs() * 2**-7 if device == "cpu" else 0.0
        assert ((state.shadow.float() - state.weight.bfloat16().float()).abs() <= ulp).all()
        norms = state.weight.norm(dim=1)
        ones = torch.ones_like(norms)
        if unit:
            torch.testing.assert_close(norms, ones)
        else:
            assert not torch.allclose(norms, ones)


def test_never_and_once(device):
    """A latent that never fires does not move; one that fired once moves on by its momentum."""
    W_dec, W_enc = weights()
    _, encoder = train(device, steps=2)
    moved = (encoder.weight.cpu() - W_enc).abs().amax(1)
    assert moved[NEVER] == 0 and moved[ONCE] > 0
    after_one = (train(device, steps=1)[1].weight.cpu() - W_enc).abs().amax(1)
    assert moved[ONCE] > after_one[ONCE] > 0


def test_same_bits_twice(device):
    for moments in (None, torch.bfloat16):
        one, two = (train(device, moments, T=4, steps=2) for _ in range(2))
        for a, b in zip((*one[0][:4], *one[1][:4]), (*two[0][:4], *two[1][:4]), strict=True):
            assert isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
            assert torch.equal(a, b)


def test_both_paths_agree_on_a_window(device):
    """Kernel and torch path make the same catch-up, in fp32 rounding."""
    got = train(device, T=3, steps=6)
    expected = train_on_torch_path(T=3, steps=6, dtype=torch.float64)
    same, exact = (train_dense(dtype, False, 6) for dtype in (torch.float32, torch.float64))
    for a, b, s, e in zip(got, expected, same, exact, strict=True):
        assert (a.weight.cpu() - b.weight).abs().max() <= 2 * (s - e).abs().max()


@pytest.mark.parametrize("options", [{"extra": True}, {"T": 3}])
def test_both_paths_agree_with_a_second_moment_per_row(device, options):
    options |= {"steps": 6, "per_row": True}
    got = train(device, **options)
    same, exact = (train_on_torch_path(dtype=t, **options) for t in (torch.float32, torch.float64))
    for a, s, e in zip(got, same, exact, strict=True):
        assert a.second.shape == (F, 1)
        allowed = 2 * (s.weight - e.weight).abs().max() + torch.finfo(torch.float32).eps
        assert (a.weight.cpu() - e.weight).abs().max() <= allowed


@torch.no_grad()
def step_reference(values, d_values, error, x, indices, W_dec, W_enc, m, v) -> tuple[Tensor, ...]:
    """Both weights and what is summed for the biases, after a step on dense gradients."""
    ones, at = x.new_ones(len(x), 1), AdamStep(3, LR)
    bias = scatter_outer_reference(d_values, indices, ones, len(W_enc))[:, 0]
    d_dec = scatter_outer_reference(values, indices, error, len(W_dec))
    d_enc = scatter_outer_reference(d_values, indices, x, len(W_enc))
    new_dec, *_ = adam_reference(W_dec, m, v, d_dec, at, unit=True)
    new_enc, new_m, new_v = adam_reference(W_enc, m, v, d_enc, at, unit=False)
    return new_dec, new_enc, new_m, new_v, bias, bias @ W_enc


@torch.no_grad()
def step(values, d_values, error, x, indices, W_dec, W_enc, m, v) -> tuple[Tensor, ...]:
    decoder, encoder = (Rows(W.clone(), m.clone(), v.clone()) for W in (W_dec, W_enc))
    runs = latent_major(indices, len(W_enc))
    entries, d_entries = (t.flatten()[runs.entry] for t in (values, d_values))
    g = RowGradients(runs, entries, error, d_entries, x)
    biases = adam_(decoder, encoder, g, AdamStep(3, LR))
    return decoder.weight, *encoder[:3], *biases


@pytest.mark.parametrize(
    ("n", "f", "d"), [(130, F, D), (0, F, D), (1, 1, 1), (300, 5, 33), (20, 11, 600)]
)
@pytest.mark.parametrize("per_row", [False, True])
def test_a_step_and_the_sums_for_the_biases(device, n, f, d, per_row):
    """Several programs, one of few rows; sums of whole chunks of entries and of none."""
    torch.manual_seed(0)
    values, d_values = torch.randn(2, n, K)
    indices = torch.randint(f, (n, K)) * (torch.arange(K) > 0)  # all tokens have latent 0
    (error, x), (W_dec, W_enc, m, v) = torch.randn(2, n, d), torch.randn(4, f, d)
    v = v.square().mean(1, keepdim=True) if per_row else v.square()
    tensors = values, d_values, error, x, indices, normalize(W_dec, dim=1), W_enc, m, v
    assert_no_worse(step, step_reference, *(t.to(device) for t in tensors))


@small_chunks()
def test_gradients_of_any_strides(device):
    """Sums of tokens and extra rows whose elements do not follow each other in memory."""
    indices, values, d_values, error, x = (t.to(device) for t in next(batches(1)))
    runs = latent_major(indices, F)
    entries = [t.flatten()[runs.entry] for t in (values, d_values)]
    extra = EXTRA.to(device), *(t.to(device) for t in extra_gradients(x.dtype))
    found = []
    for strided in (False, True):
        v, d_v, e, seen, *more = (
            torch.stack([t, t], dim=-1)[..., 0] if strided else t
            for t in (*entries, error, x, *extra)
        )
        decoder, encoder = (rows(W, device=device) for W in weights())
        g = RowGradients(runs, v, e, d_v, seen, (more[0], more[1], more[2]))
        found.append((*adam_(decoder, encoder, g, AdamStep(1, LR)), *decoder[:3], *encoder[:3]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("per_row", [False, True])
def test_a_dense_gradient_of_any_strides(device, per_row):
    gradient, found = torch.randn(F, D, device=device), []
    for g in (gradient, gradient.T.contiguous().T):
        weight, first = torch.ones(2, F, D, device=device)
        second = torch.zeros(F, 1 if per_row else D, device=device)
        dense_adam_(weight, g, first, second, AdamStep(1, LR))
        found.append((weight, first, second))
    assert all(map(torch.allclose, *found)) and not torch.equal(found[0][0], torch.ones_like(g))


def test_nan_stays_where_it_is(device):
    """In the moments of one row, whether rounded or not."""
    for moments in (None, torch.bfloat16):
        decoder, encoder = (rows(W, moments, device) for W in weights())
        for state in (decoder, encoder):
            state.second[NEVER, 3] = float("nan")
        indices, values, d_values, error, x = (t.to(device) for t in next(batches(1)))
        runs = latent_major(indices, F)
        v, d_v = (t.flatten()[runs.entry] for t in (values, d_values))
        adam_(decoder, encoder, RowGradients(runs, v, error, d_v, x), AdamStep(1, LR))
        for state in (decoder, encoder):
            wrong = state.second.isnan()
            assert wrong[NEVER, 3] and wrong.sum() == 1
            assert set(state.weight.isnan().nonzero()[:, 0].tolist()) == {NEVER}


def test_reference_is_torch_adam():
    W, _ = weights(torch.float64)
    m, v = torch.zeros(2, F, D, dtype=torch.float64)
    adam = torch.optim.Adam([W.clone().requires_grad_()], lr=LR, eps=6.25e-10)
    (parameter,) = adam.param_groups[0]["params"]
    for step in range(1, 6):
        g = torch.randn(F, D, dtype=torch.float64)
        parameter.grad = g - (g * W).sum(1, keepdim=True) * W
        adam.step()
        parameter.data = normalize(parameter.data, dim=1)
        W, m, v = adam_reference(W, m, v, g, AdamStep(step, LR), unit=True)
        torch.testing.assert_close(W, parameter.data)


def test_stochastic_rounding_is_right_on_average():
    x = torch.tensor([1 + 2**-9, -3.0, 1e-20 * (1 + 2**-10)]).repeat(100_000, 1)
    rounded = stochastic_bf16(x, torch.Generator().manual_seed(0)).float()
    deviation = rounded.std(0) / len(x) ** 0.5
    assert ((rounded.mean(0) - x[0]).abs() <= 5 * deviation).all()
    assert rounded[:, 0].unique().tolist() == [1.0, 1 + 2**-7]


@pytest.mark.parametrize(
    ("moments", "T", "steps", "per_row"),
    [(torch.bfloat16, 1, 3, False), (torch.bfloat16, 1, 3, True), (None, 4, 5, False)],
)
def test_options_deviate_by_less_than_a_step(device, moments, T, steps, per_row):
    """Adam moves no weight by more than about the learning rate in a step."""
    got = train(device, moments, T, steps=steps, per_row=per_row)
    exact = train_on_torch_path(steps=steps, per_row=per_row)
    for state, reference in zip(got, exact, strict=True):
        assert state.first.dtype == (moments or torch.float32)
        deviation = (state.weight.cpu() - reference.weight).abs().max()
        if moments is not None:
            assert 0 < deviation < LR / 2
        elif state is got[0]:  # decoder rows that waited are normalized once, not at every step
            assert 0 < deviation < LR**2
        else:
            assert deviation <= 4 * torch.finfo(torch.float32).eps * reference.weight.abs().max()


def test_seeds_differ_and_may_be_large(device):
    """In what stochastic rounding makes of the moments."""
    firsts = [train(device, torch.bfloat16, steps=1, seed=s)[1].first for s in (0, 3, 2**40)]
    assert not torch.equal(firsts[0], firsts[1])
    assert not torch.equal(firsts[0], firsts[2])


def test_stochastic_rounding_keeps_nan_inf_and_sign():
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), -1.0, 0.0])
    x[0] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # as a GPU writes NaN
    rounded = stochastic_bf16(x, torch.Generator().manual_seed(0))
    assert rounded[0].isnan()
    assert rounded[1:].tolist() == [float("inf"), -float("inf"), -1.0, 0.0]


def test_wrong_arguments_are_named():
    decoder, encoder = (rows(W) for W in weights())
    indices, values, d_values, error, x = next(batches(1))
    runs = latent_major(indices, F)
    v, d_v = (t.flatten()[runs.entry] for t in (values, d_values))
    gradients, at = RowGradients(runs, v, error, d_v, x), AdamStep(1, LR)
    with pytest.raises(ValueError, match=r"encoder.second must be .* of shape"):
        adam_(decoder, encoder._replace(second=torch.zeros(F, D + 1)), gradients, at)
    with pytest.raises(ValueError, match="encoder's moments must be torch.float32, or bfloat16 of"):
        half = torch.zeros(F, D, dtype=torch.float16)
        adam_(decoder, encoder._replace(first=half, second=half), gradients, at)
    with pytest.raises(ValueError, match="a second moment per row always torch.float32"):
        half = torch.zeros(F, 1, dtype=torch.bfloat16)
        adam_(decoder, encoder._replace(second=half), gradients, at)
    with pytest.raises(ValueError, match="must have one dtype, got torch.float32, torch.bfloat16"):
        half = torch.zeros(F, D, dtype=torch.bfloat16)
        adam_(decoder, encoder._replace(first=half, second=half), gradients, at)
    with pytest.raises(ValueError, match="x must be .* of shape"):
        adam_(decoder, encoder, gradients._replace(x=x[:, 1:]), at)
    with pytest.raises(ValueError, match=rf"runs.start must be .* of shape \[{F + 1}\]"):
        adam_(decoder, encoder, gradients._replace(runs=latent_major(indices, F + 1)), at)
    with pytest.raises(ValueError, match=rf"window.updated must be .* of shape \[{F}\]"):
        window = Window(torch.zeros(F + 1, dtype=torch.int32), torch.zeros(2))
        adam_(decoder, encoder, gradients, at, window)
    with pytest.raises(ValueError, match=r"extra rows must be .* of shape \[2\], got \[3\]"):
        extra = torch.arange(3), torch.zeros(2, D), torch.zeros(2, D)
        adam_(decoder, encoder, gradients._replace(extra=extra), at)
