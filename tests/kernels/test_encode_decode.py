import json
from collections import defaultdict
from typing import get_args

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.profiler import ProfilerActivity, profile

from fastsae_kernels import decode, encode_topk
from fastsae_kernels.encode_decode import (
    Gradient,
    encode_decode,
    encode_decode_reference,
)
from fastsae_kernels.testing import assert_no_worse

from .parametrize import BY, each_by, pairwise

GRADIENTS = get_args(Gradient)
each_gradient = pytest.mark.parametrize("gradient", GRADIENTS)
ROTATIONS = GRADIENTS[1:]
ALGORITHMS = "gram", "dense"
DTYPES = torch.float32, torch.bfloat16
SHAPES = [  # N, D, D_out, F, k
    (7, 5, 6, 12, 3),
    (14, 3, 7, 5, 5),  # N much larger than D, and every latent kept
    (5, 17, 9, 21, 5),
    (0, 4, 5, 8, 2),
]


@pytest.fixture(params=ALGORITHMS)
def algorithm(request, monkeypatch):
    gram = request.param == "gram"
    monkeypatch.setattr("fastsae_kernels.rotation.gram_is_cheaper", lambda *_: gram)


def make(shape, device="cpu", dtype=torch.float32, draw=torch.randn):
    """x, W_enc, b_enc, W_dec, b_dec"""
    N, D, D_out, F, _ = shape
    return [draw(s).to(device, dtype) for s in ((N, D), (F, D), (F,), (F, D_out), (D_out,))]


def integers(size):
    """What every dtype and every order of summation multiplies exactly, with many ties."""
    return torch.randint(-1, 2, size)


def separated(shape, device, dtype=torch.float32, by="value"):
    """Only tokens of which no rounding exchanges the k + 1 largest, or changes their signs."""
    N, D, D_out, F, k = shape
    x, W, b, *decoder = make((100 * N, D, D_out, F, k), device, dtype)
    h = torch.addmm(b.double(), x.double(), W.double().t())
    ranks = (h.abs() if by == "abs" else h).topk(min(k + 1, F)).values
    least = 8 * torch.finfo(dtype).eps * h.abs().amax(1, keepdim=True)
    apart = (-ranks.diff(dim=1) > least).all(1) & (ranks.abs() > least).all(1)
    x = x[apart][:N]
    assert len(x) == N
    return x, W, b, *decoder


def against_reference(arguments, k, by, gradient):
    choices = {"k": k, "by": by, "gradient": gradient}
    assert_no_worse(
        lambda *tensors: encode_decode(*tensors, **choices),
        lambda *tensors: encode_decode_reference(*tensors, **choices),
        *arguments,
    )


def gradients(function, arguments):
    """Of a sum over recon and values that weighs every entry differently."""
    leaves = [t.detach().requires_grad_() for t in arguments]
    recon, values, _ = function(*leaves)
    weights = [torch.linspace(-1, 2, t.numel()).to(t).view(t.shape) for t in (recon, values)]
    return torch.autograd.grad([recon, values], leaves, weights)


@pairwise(shape=SHAPES, by=BY, gradient=GRADIENTS, dtype=DTYPES)
def test_forward_is_that_of_the_parts_to_the_bit(device, shape, by, gradient, dtype):
    x, W_enc, b_enc, W_dec, b_dec = make(shape, device, dtype)
    recon, values, indices = encode_decode(x, W_enc, b_enc, W_dec, b_dec, shape[4], by, gradient)
    expected, where = encode_topk(x, W_enc, b_enc, shape[4], by)
    assert torch.equal(values, expected) and torch.equal(indices, where)
    assert torch.equal(recon, decode(expected, where, W_dec) + b_dec)


@pairwise(shape=SHAPES, by=BY, dtype=DTYPES)
def test_straight_through_gradients_are_those_of_the_parts_to_the_bit(device, shape, by, dtype):
    k = shape[4]

    def parts(x, W_enc, b_enc, W_dec, b_dec):
        values, indices = encode_topk(x, W_enc, b_enc, k, by)
        return decode(values, indices, W_dec) + b_dec, values, indices

    arguments = make(shape, device, dtype)
    for got, expected in zip(
        gradients(lambda *tensors: encode_decode(*tensors, k=k, by=by), arguments),
        gradients(parts, arguments),
        strict=True,
    ):
        assert torch.equal(got, expected)


@each_by
def test_straight_through(device, by):
    against_reference(separated(SHAPES[0], device, by=by), 3, by, "straight_through")


@pairwise(algorithm=ALGORITHMS, shape=SHAPES, by=BY, gradient=ROTATIONS, indirect=["algorithm"])
def test_rotation(device, algorithm, shape, by, gradient):
    against_reference(separated(shape, device, by=by), shape[4], by, gradient)


@pairwise(algorithm=ALGORITHMS, by=BY, gradient=ROTATIONS, indirect=["algorithm"])
def test_rotation_in_bfloat16(device, algorithm, by, gradient):
    arguments = separated(SHAPES[0], device, torch.bfloat16, by)
    against_reference(arguments, 3, by, gradient)


@pairwise(algorithm=ALGORITHMS, shape=SHAPES, by=BY, gradient=ROTATIONS, indirect=["algorithm"])
def test_ties_go_to_the_lowest_latent(device, algorithm, shape, by, gradient):
    against_reference(make(shape, device, draw=integers), shape[4], by, gradient)


@each_gradient
def test_inactive_tokens_get_no_gradient(device, algorithm, gradient):
    """h = 0; all of h below 0; fewer than k above 0."""
    W_enc = torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    x = torch.tensor([[0.0, 0], [-1, -2], [-1, 2]])
    arguments = x, W_enc, torch.zeros(3), torch.randn(3, 4), torch.randn(4)
    arguments = [t.to(device) for t in arguments]
    against_reference(arguments, 2, "value", gradient)
    dx, *_ = gradients(lambda *tensors: encode_decode(*tensors, k=2, gradient=gradient), arguments)
    assert (dx[:2] == 0).all() and (dx[2] != 0).any()


def test_dense_reaches_latents_that_are_not_kept(device, algorithm):
    shape = 3, 5, 6, 20, 2
    arguments = make(shape, device)
    _, _, indices = encode_decode(*arguments, k=2)
    kept = torch.zeros(20, dtype=torch.bool, device=device).index_fill(0, indices.flatten(), True)
    for gradient, some in zip(GRADIENTS, (False, False, True), strict=True):
        _, dW_enc, *_ = gradients(
            lambda *tensors, g=gradient: encode_decode(*tensors, k=2, gradient=g), arguments
        )
        assert (dW_enc[kept] != 0).any(1).all()
        assert (dW_enc[~kept] != 0).any(1).all() == some


@each_gradient
@pytest.mark.parametrize("only", range(5))
def test_gradients_of_one_argument_alone(device, gradient, only):
    arguments = make(SHAPES[0], device)

    def of(*tensors):
        return encode_decode(*tensors, k=3, gradient=gradient)

    every = gradients(of, arguments)
    leaf = arguments[only].detach().requires_grad_()
    recon, values, _ = of(*(leaf if n == only else t for n, t in enumerate(arguments)))
    weights = [torch.linspace(-1, 2, t.numel()).to(t).view(t.shape) for t in (recon, values)]
    outputs = [(t, w) for t, w in zip((recon, values), weights, strict=True) if t.requires_grad]
    outs, grads = zip(*outputs, strict=True)
    (got,) = torch.autograd.grad(outs, leaf, grads)
    torch.testing.assert_close(got, every[only])  # what is cheaper depends on what is asked for


@each_gradient
def test_loss_of_one_output_alone(device, gradient):
    """What the other would pass on is nothing."""
    arguments = separated(SHAPES[0], device)
    for output in range(2):
        assert_no_worse(
            lambda *tensors, n=output: encode_decode(*tensors, k=3, gradient=gradient)[n],
            lambda *tensors, n=output: encode_decode_reference(*tensors, k=3, gradient=gradient)[n],
            *arguments,
        )


@each_by
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_first_and_second_derivatives(device, check, by):
    """Of the straight-through gradient: the others are not derivatives."""
    leaves = [t.requires_grad_() for t in separated((1, 2, 1, 3, 2), device, torch.float64, by)]
    assert check(lambda *tensors: encode_decode(*tensors, k=2, by=by)[:2], leaves, fast_mode=True)


@each_gradient
def test_same_bits_twice(device, gradient):
    arguments = make((13, 5, 6, 7, 3), device)

    def function(*tensors):
        return encode_decode(*tensors, k=3, gradient=gradient)

    one, two = ((*function(*arguments), *gradients(function, arguments)) for _ in range(2))
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)


def most_bytes_freed_again(run, path) -> int:
    """The most memory at a time that run allocated and no longer holds when it is done.

    Counted by torch's allocator, inside operators too. What it leaves are the results.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        results = run()
    recorded.export_chrome_trace(str(path))
    del results
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e["name"] == "[memory]"]
    open_at, steps = {}, defaultdict(int)
    for n, event in enumerate(sorted(events, key=lambda e: e["ts"])):
        address, size = event["args"]["Addr"], event["args"]["Bytes"]
        if size > 0:
            open_at[address] = n
        elif address in open_at:
            steps[open_at.pop(address)] -= size
            steps[n] += size
    most = total = 0
    for n in sorted(steps):
        total += steps[n]
        most = max(most, total)
    return most


@pytest.mark.parametrize("gradient", ROTATIONS)
def test_memory_of_the_backward_pass(tmp_path, gradient):
    """Beside its results, less than an eighth of a tensor of all pre-activations: 25 MB."""
    N, D, F = 4096, 384, 12288
    leaves = [t.requires_grad_() for t in make((N, D, D, F, 32))]
    recon, _, _ = encode_decode(*leaves, k=32, gradient=gradient)
    d_recon = torch.randn(N, D)

    def run():
        return torch.autograd.grad(recon, leaves, d_recon)

    most = most_bytes_freed_again(run, tmp_path / "trace.json")
    assert N * D * 4 < most < N * F * 4 / 8
