"""The rotation trick's gradient, by both algorithms, against the formula with explicit matrices."""

import pytest
import torch

from fastsae_kernels._rotation_backward import Layer, gram_is_cheaper
from fastsae_kernels.rotation import (
    Mode,
    rotation_gradient_reference,
    rotation_gradients,
    rotation_gradients_reference,
    rotation_reference,
)
from fastsae_kernels.testing import assert_no_worse
from fastsae_kernels.topk import By, topk_reference

from .parametrize import pairwise

SHAPES = [  # N, D, D_out, F, k
    (1, 1, 1, 1, 1),
    (1, 3, 3, 7, 2),
    (37, 5, 5, 20, 3),
    (20, 4, 7, 11, 11),  # N much larger than D, and every latent kept
    (3, 17, 9, 40, 5),
    (6, 64, 64, 70, 8),
    (0, 4, 5, 8, 2),
]
EVERY = True, True, True
each_mode = pytest.mark.parametrize("mode", ["support", "dense"])
CHOICES = {"algorithm": ["gram", "dense"], "by": ["value", "abs"], "mode": ["support", "dense"]}


@pytest.fixture(params=["gram", "dense"])
def algorithm(request, monkeypatch):
    gram = request.param == "gram"
    monkeypatch.setattr("fastsae_kernels.rotation.gram_is_cheaper", lambda *_: gram)


def make(shape, device="cpu", dtype=torch.float32, by: By = "value"):
    """x, W_enc, b_enc, W_dec, values, indices, d_recon, d_values"""
    N, D, D_out, F, k = shape
    sizes = (N, D), (F, D), (F,), (F, D_out), (N, D_out), (N, k)
    x, W_enc, b_enc, W_dec, d_recon, d_values = (torch.randn(size).to(dtype) for size in sizes)
    return with_code(x, W_enc, b_enc, W_dec, d_recon, d_values, by, device)


def with_code(x, W_enc, b_enc, W_dec, d_recon, d_values, by: By = "value", device="cpu"):
    pre = torch.addmm(b_enc.double(), x.double(), W_enc.double().t())
    values, indices = topk_reference(pre, d_values.shape[1], by)
    arguments = x, W_enc, b_enc, W_dec, values.to(x.dtype), indices, d_recon, d_values
    return [t.to(device) for t in arguments]


def special(device, dtype=torch.float32):
    """Tokens 0, h = 0; 1, all of h below 0; 2, only latent 3 above 0; 3, ties; 4, q = h."""
    W_enc = torch.tensor([[1.0, 0, 0], [1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]])
    x = torch.tensor([[0.0, 0, 0], [-1, -2, -1], [-1, 2, -3], [2, 1, 2], [3, 0, 0]])
    tensors = [torch.randn(size) for size in ((6, 4), (5, 4), (5, 4))]
    W_dec, d_recon, d_values = (t.to(dtype) for t in tensors)
    x, W_enc, b_enc = (t.to(dtype) for t in (x, W_enc, torch.zeros(6)))
    return with_code(x, W_enc, b_enc, W_dec, d_recon, d_values, device=device)


def run(*arguments, mode: Mode = "dense"):
    """All three gradients, cut from any graph."""
    return tuple(t.detach() for t in rotation_gradients(*arguments, mode, EVERY))


def no_worse(arguments, mode):
    """dx, dW_enc and db_enc err at most twice as much as the reference."""
    assert_no_worse(
        lambda *tensors: run(*tensors, mode=mode),
        lambda *tensors: tuple(
            t.detach() for t in rotation_gradients_reference(*tensors, mode=mode)
        ),
        *arguments,
    )


def assert_same(gradients, expected):
    for one, two in zip(gradients, expected, strict=True):
        assert torch.equal(one, two)


@pairwise(["algorithm"], shape=[s for s in SHAPES if s[0] != 1], **CHOICES)
def test_gradients(device, algorithm, shape, by, mode):
    """Not of one token: the reference's error is a matter of luck there."""
    no_worse(make(shape, device, by=by), mode)


@pairwise(["algorithm"], shape=SHAPES, **CHOICES)
def test_formulas_are_exact(device, algorithm, shape, by, mode):
    """Up to roundings of float64, of which the formulas cancel a few hundred at most."""
    arguments = make(shape, device, torch.float64, by)
    exact = rotation_gradients_reference(*arguments, mode=mode)
    for got, expected in zip(run(*arguments, mode=mode), exact, strict=True):
        scale = expected.abs().max() if expected.numel() else 0.0
        assert (got - expected).abs().le(1e-13 * scale).all()


@each_mode
def test_more_columns_and_latents_than_a_block(device, mode, monkeypatch):
    monkeypatch.setattr("fastsae_kernels.rotation.gram_is_cheaper", lambda *_: True)
    no_worse(make((9, 1030, 1100, 150, 140), device), mode)


@each_mode
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(device, algorithm, dtype, mode):
    no_worse(make((37, 5, 6, 20, 3), device, dtype), mode)


@each_mode
def test_special_tokens(device, algorithm, mode):
    arguments = special(device)
    no_worse(arguments, mode)
    dx, _, _ = run(*arguments, mode=mode)
    assert (dx[:2] == 0).all() and (dx[2:] != 0).any(1).all()


@each_mode
def test_without_an_active_token(device, algorithm, mode):
    dead = [t[:2] if len(t) == 5 else t for t in special(device)]
    for gradient in run(*dead, mode=mode):
        assert (gradient == 0).all()


@each_mode
def test_inactive_entries_count_for_nothing(device, algorithm, mode):
    *arguments, d_values = special(device)
    inactive = arguments[4] == 0
    assert inactive.any()
    changed = d_values.masked_fill(inactive, float("inf"))
    assert_same(run(*arguments, changed, mode=mode), run(*arguments, d_values, mode=mode))


def test_nan_is_never_dropped(device, algorithm):
    x, *rest = make((6, 4, 4, 9, 2), device)
    x[2] = float("nan")
    rest[3][2] = float("nan")
    dx, dW_enc, db_enc = run(x, *rest)
    assert dx.isnan().all(1).tolist() == [False, False, True, False, False, False]
    assert dW_enc.isnan().all() and db_enc.isnan().all()


def test_reference_scales_and_turns_h_to_q():
    h = torch.randn(5, 6, dtype=torch.float64)
    values, indices = topk_reference(h, 2)
    q = torch.zeros_like(h).scatter(1, indices, values)
    R = rotation_reference(h, q)
    scale = (q.norm(dim=1) / h.norm(dim=1))[:, None, None]
    torch.testing.assert_close(R @ h[:, :, None], q[:, :, None])
    torch.testing.assert_close(R @ R.mT, scale**2 * torch.eye(6).to(h).expand(5, 6, 6))
    assert (R.det() > 0).all()
    # Differentiated by autograd, with lambda and R constant.
    g, h = torch.randn_like(h), h.requires_grad_()
    (expected,) = torch.autograd.grad((R @ h[:, :, None])[:, :, 0], h, g)
    torch.testing.assert_close(rotation_gradient_reference(h, q, g), expected)


@each_mode
@pytest.mark.parametrize("tokens", [0, 3, 100])
def test_chunks_of_tokens(device, monkeypatch, tokens, mode):
    """The buffer holds h, g and a product of so many tokens (one at least)."""
    monkeypatch.setattr("fastsae_kernels.rotation.gram_is_cheaper", lambda *_: False)
    size = 2 * 20 * 4 * tokens
    monkeypatch.setattr("fastsae_kernels._launch.buffer_bytes", lambda device: size)
    no_worse(make((7, 5, 6, 20, 3), device), mode)


@pytest.mark.parametrize("d_out", [384, 768])
@pytest.mark.parametrize("mode", ["support", "dense"])
def test_gram_is_cheaper_for_many_tokens(mode, d_out):
    F, D = 24576, 384
    x, W_enc, b_enc = (torch.empty(s, device="meta") for s in ((0, D), (F, D), (F,)))
    W_dec = torch.empty(F, d_out, device="meta")
    layer = Layer(x, W_enc, b_enc, W_dec, x)
    for needs in ((True, True, True), (False, True, True), (True, False, False)):
        cheaper = [gram_is_cheaper(N, layer, mode, needs) for N in (1, D // 2, 2 * D, 4096)]
        assert cheaper == [False, False, True, True]


@each_mode
def test_same_bits_twice(device, algorithm, mode):
    arguments = make((37, 5, 6, 20, 3), device)
    assert_same(run(*arguments, mode=mode), run(*arguments, mode=mode))


@each_mode
def test_only_what_is_needed(device, algorithm, mode):
    arguments = make((37, 5, 6, 20, 3), device)
    every = run(*arguments, mode=mode)
    for only in range(3):
        got = rotation_gradients(*arguments, mode, [n == only for n in range(3)])
        assert [len(t) > 0 for t in got] == [n == only for n in range(3)]
        assert_same([got[only]], [every[only]])


def test_other_integers_and_strides(device, algorithm):
    arguments = make((7, 5, 6, 20, 3), device)
    strided = [torch.stack([t, t], dim=-1)[..., 0] for t in arguments]
    strided[5] = strided[5].int()
    assert_same(run(*strided), run(*arguments))


@each_mode
@pytest.mark.parametrize("needs", [(True, True, True), (False, True, False)])
def test_op(device, algorithm, mode, needs):
    arguments = make((7, 5, 6, 20, 3), device)
    torch.library.opcheck(torch.ops.fastsae.rotation_gradients.default, (*arguments, mode, needs))
