"""Every op that is timed: what it is called on, the least it must do, and plain PyTorch's way.

Adding an op takes an entry of OPS, which `python -m bench kernels` and the GPU run both read.
Bytes count inputs read once and outputs written once; an index takes 8, other entries `item`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, linear

import fastsae_kernels as ours
from fastsae_kernels.adam import AdamStep, RowGradients, Rows, Window, adam_
from fastsae_kernels.jumprelu import jumprelu_l0_reference, jumprelu_reference
from fastsae_kernels.latent_major import latent_major
from fastsae_kernels.rational import rational_reference
from fastsae_kernels.rotation import rotation_gradients

from .dense import rotation_dense
from .problem import Problem
from .roofs import Cost

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def precision(p: Problem) -> str:
    return next(name for name, dtype in DTYPES.items() if dtype == p.dtype)


@dataclass(frozen=True, kw_only=True)
class Op:
    run: Callable[..., Any]
    """The public function, or what calls it."""
    called: str = ""
    """The function's name, where it is not that of run."""
    variant: str = ""
    """What distinguishes it from other entries of the function."""
    make: Callable[[Problem], tuple]
    """Its arguments."""
    cost: Callable[..., Cost]
    """From the problem and the arguments."""
    backward: Callable[..., tuple[float, float]] | None = None
    """Bytes and FLOPs that its gradients add; None where it has none."""
    torch: Callable[..., Any]
    """Plain PyTorch's way to the same."""
    torch_make: Callable[[Problem], tuple] | None = None
    """The arguments of that, where they are others."""
    step: bool = False
    """Whether a training step consists of it."""

    @property
    def function(self) -> str:
        return self.called or self.run.__name__

    @property
    def name(self) -> str:
        return f"{self.function}, {self.variant}" if self.variant else self.function


def touched(indices: Tensor, F: int) -> int:
    """Latents that occur in a code."""
    return int(torch.bincount(indices.flatten(), minlength=F).count_nonzero())


# --- encoders -------------------------------------------------------------------------------


def encoder(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    return p.normal(p.N, p.D), p.weights(), p.normal(p.F, std=0.1)


def encode_cost(p: Problem, *_: Any, decoded: bool = False) -> Cost:
    item, entries = p.dtype.itemsize, p.N * p.K
    moved = item * (p.N + p.F) * p.D * (1 + decoded) + (8 + item) * entries
    flops = 2 * p.N * p.F * p.D + 2 * entries * p.D * decoded
    return Cost(moved, flops, precision(p))


def encode_backward(p: Problem, *_: Any, decoded: bool = False) -> tuple[float, float]:
    """Tokens and weights are read again, and as much is written."""
    parts = 1 + decoded
    return parts * 2 * p.dtype.itemsize * (p.N + p.F) * p.D, parts * 4 * p.N * p.K * p.D


def threshold(p: Problem) -> Tensor:
    """What K of F pre-activations exceed."""
    share = torch.tensor(min(p.K / p.F, 0.5))
    return torch.full((p.F,), -float(torch.special.ndtri(share)), device=p.device)


def above_torch(x: Tensor, W: Tensor, b: Tensor, threshold: Tensor) -> Tensor:
    """Codes are dense."""
    h = linear(x, W, b)
    return h.where(h > threshold, 0.0)


def topk_torch(x: Tensor, W: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, indices = linear(x, W, b).topk(k)
    return values.relu(), indices


def batch_torch(pre: Tensor, k_total: int) -> Tensor:
    """Codes are dense."""
    values, position = pre.flatten().topk(k_total)
    return torch.zeros_like(pre).flatten().scatter(0, position, values.relu()).view_as(pre)


def autoencoder_torch(x: Tensor, W: Tensor, b: Tensor, V: Tensor, c: Tensor, k: int) -> Tensor:
    values, indices = topk_torch(x, W, b, k)
    return x.new_zeros(len(x), len(W)).scatter(1, indices, values) @ V + c


def pre_activations(p: Problem) -> Tensor:
    """As many as exist at a time."""
    return p.normal(p.chunk(), p.F)


def elementwise(p: Problem, h: Tensor, *_: Any, tensors: float = 1, flops: int = 1) -> Cost:
    """So many tensors like h, so many FLOPs an entry."""
    return Cost(tensors * h.nbytes, flops * h.numel())


def elementwise_backward(
    p: Problem, h: Tensor, *_: Any, tensors: float = 2, flops: int = 2
) -> tuple[float, float]:
    return tensors * h.nbytes, flops * h.numel()


# --- sparse products ------------------------------------------------------------------------


def decode_inputs(p: Problem) -> tuple:
    return *p.codes(), p.weights()


def sparse_cost(p: Problem, indices: Tensor, rows: float, products: int = 1) -> Cost:
    """Products of codes with the rows of W that occur in them, and so many rows of tokens."""
    item, entries = p.dtype.itemsize, p.N * p.K
    moved = item * (touched(indices, p.F) + rows) * p.D + (8 + item) * entries
    gathered = item * entries * p.D
    return Cost(moved, 2 * products * entries * p.D, gathered=gathered)


def sparse_backward(p: Problem, *_: Any) -> tuple[float, float]:
    """The output's gradient and the rows are read, and a dense gradient of W is written."""
    return p.dtype.itemsize * (2 * p.N + 2 * p.F) * p.D, 4 * p.N * p.K * p.D


def decode_torch(values: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    return embedding_bag(indices, W, per_sample_weights=values, mode="sum")


def gather_torch(x: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    return torch.bmm(W[indices], x[:, :, None]).squeeze(2)


def error_inputs(p: Problem) -> tuple:
    fp32 = torch.float32
    return *decode_inputs(p), p.normal(p.D, dtype=fp32), p.normal(p.N, p.D, dtype=fp32)


def error_torch(values: Tensor, indices: Tensor, W: Tensor, b: Tensor, target: Tensor) -> tuple:
    """As in the step, target and bias are in float32; error and dots are constants."""
    error = decode_torch(values, indices, W) + b - target
    low = error.detach().to(W.dtype)
    return error.square().sum(1), low, gather_torch(low, indices, W.detach())


def outer_torch(values: Tensor, indices: Tensor, x: Tensor, F: int) -> Tensor:
    outer = (values[:, :, None] * x[:, None, :]).flatten(0, 1)
    return x.new_zeros(F, x.shape[1]).index_add(0, indices.flatten(), outer)


# --- Adam -----------------------------------------------------------------------------------


def adam_inputs(p: Problem, moments: torch.dtype, T: int) -> tuple:
    fp32 = torch.float32
    weights = [p.weights(fp32) for _ in range(2)]
    firsts = [p.normal(p.F, p.D, dtype=moments, std=1e-3) for _ in weights]
    decoder, encoder = (
        Rows(W, first, first.square(), W.bfloat16())
        for W, first in zip(weights, firsts, strict=True)
    )
    (v, indices), d_v = p.codes(fp32), p.normal(p.N, p.K, dtype=fp32)
    runs = latent_major(indices, p.F)
    entries = [t.flatten()[runs.entry] for t in (v, d_v)]
    error, x = (p.normal(p.N, p.D) for _ in range(2))
    gradients = RowGradients(runs, entries[0], error, entries[1], x)
    window = None
    if T > 1:
        updated = torch.zeros(p.F, dtype=torch.int32, device=p.device)
        window = Window(updated, torch.zeros(T, device=p.device))
    return decoder, encoder, gradients, window, [0]


def adam_step(
    decoder: Rows, encoder: Rows, g: RowGradients, window: Window | None, step: list[int]
) -> None:
    step[0] += 1
    adam_(decoder, encoder, g, AdamStep(step[0], 1e-5), window)


def adam_cost(p: Problem, decoder: Rows, encoder: Rows, g: RowGradients, window, _: Any) -> Cost:
    """Rows without a gradient are visited in every T-th step."""
    per_parameter = 26 if decoder.first.dtype == torch.float32 else 18
    visited = p.F
    if window is not None:
        busy = int((g.runs.start.diff() > 0).sum())
        visited = busy + (p.F - busy) / len(window.history)
    item, entries = p.dtype.itemsize, p.N * p.K
    moved = 2 * per_parameter * visited * p.D + 2 * item * p.N * p.D
    return Cost(moved, 4 * entries * p.D, gathered=2 * item * entries * p.D)


def dense_adam_inputs(p: Problem) -> tuple:
    weights = [p.weights(torch.float32) for _ in range(2)]
    for W in weights:
        W.grad = p.normal(p.F, p.D, dtype=torch.float32)
    adam = torch.optim.Adam(weights, lr=1e-5, fused=True)
    adam.step()
    return adam, *weights, *(W.grad for W in weights)


def adam_op(variant: str, moments: torch.dtype, T: int) -> Op:
    return Op(
        run=adam_step,
        called="adam_",
        variant=variant,
        make=partial(adam_inputs, moments=moments, T=T),
        cost=adam_cost,
        torch=lambda adam, *_: adam.step(),
        torch_make=dense_adam_inputs,
        step=True,
    )


# --- activations and the rotation trick -----------------------------------------------------


def rational_inputs(p: Problem, dense: bool) -> tuple:
    h = pre_activations(p) if dense else p.normal(p.N, p.K)
    fp32 = torch.float32
    scalars = (torch.tensor(c, device=p.device) for c in (2.5, 0.9, 0.1))
    return h, p.normal(10, dtype=fp32), p.normal(8, dtype=fp32, std=0.3), *scalars


def rational_op(variant: str, dense: bool) -> Op:
    return Op(
        run=ours.rational,
        variant=variant,
        make=partial(rational_inputs, dense=dense),
        cost=partial(elementwise, tensors=2, flops=34),
        backward=partial(elementwise_backward, tensors=3, flops=102),
        torch=rational_reference,
    )


def jumprelu_op(run: Callable, reference: Callable, tensors: float) -> Op:
    return Op(
        run=run,
        make=lambda p: (pre_activations(p), p.normal(p.F).abs(), 0.3),
        cost=partial(elementwise, tensors=tensors),
        backward=partial(elementwise_backward, tensors=2 * tensors - 1, flops=5),
        torch=reference,
    )


def rotation_inputs(p: Problem, mode: str) -> tuple:
    data = encoder(p)
    codes = ours.encode_topk(*data, p.K)
    return *data, p.weights(), *codes, p.normal(p.N, p.D), p.normal(p.N, p.K), mode


def rotation_cost(p: Problem, *arguments: Any) -> Cost:
    """The FLOPs of the cheaper way; both weights and three gradients."""
    E = p.D if arguments[-1] == "dense" else 0
    gram = 4 * (p.F + p.N) * p.D * (p.D + E)
    dense = 2 * p.N * p.F * (p.D + E) + 4 * p.N * p.F * p.D
    moved = 3 * p.dtype.itemsize * (p.F + p.N) * p.D
    return Cost(moved, min(gram, dense), precision(p))


def rotation_op(mode: str) -> Op:
    return Op(
        run=rotation_gradients,
        variant=mode,
        make=partial(rotation_inputs, mode=mode),
        cost=rotation_cost,
        torch=rotation_dense,
    )


# --- the table ------------------------------------------------------------------------------

OPS: list[Op] = [
    Op(
        run=ours.encode_topk,
        make=lambda p: (*encoder(p), p.K),
        cost=encode_cost,
        backward=encode_backward,
        torch=topk_torch,
        step=True,
    ),
    Op(
        run=ours.topk,
        make=lambda p: (pre_activations(p), p.K),
        cost=lambda p, pre, k: Cost(pre.nbytes + (8 + p.dtype.itemsize) * len(pre) * k),
        backward=elementwise_backward,
        torch=torch.topk,
        step=True,
    ),
    Op(
        run=ours.squared_error,
        make=error_inputs,
        cost=lambda p, v, indices, *_: sparse_cost(p, indices, 3 * p.N, 2),
        backward=sparse_backward,
        torch=error_torch,
        step=True,
    ),
    Op(
        run=latent_major,
        make=lambda p: (p.indices(), p.F),
        cost=lambda p, *_: Cost(p.N * p.K * (8 + 8 + 4 + 4) + 4 * p.F),
        torch=lambda indices, F: indices.flatten().sort(stable=True),
        step=True,
    ),
    adam_op("", torch.float32, 1),
    adam_op("bf16 moments", torch.bfloat16, 1),
    adam_op("bf16 moments and window 8", torch.bfloat16, 8),
    Op(
        run=ours.decode,
        make=decode_inputs,
        cost=lambda p, v, indices, W: sparse_cost(p, indices, p.N),
        backward=sparse_backward,
        torch=decode_torch,
    ),
    Op(
        run=ours.gather_dot,
        make=lambda p: (p.normal(p.N, p.D), *decode_inputs(p)[1:]),
        cost=lambda p, x, indices, W: sparse_cost(p, indices, p.N),
        backward=sparse_backward,
        torch=gather_torch,
    ),
    Op(
        run=ours.scatter_outer,
        make=lambda p: (*p.codes(), p.normal(p.N, p.D), p.F),
        cost=lambda p, v, indices, *_: sparse_cost(p, indices, p.N + p.F),
        backward=sparse_backward,
        torch=outer_torch,
    ),
    Op(
        run=ours.encode_above,
        make=lambda p: (*encoder(p), threshold(p)),
        cost=encode_cost,
        backward=encode_backward,
        torch=above_torch,
    ),
    Op(
        run=ours.encode_decode,
        make=lambda p: (*encoder(p), p.weights(), p.normal(p.D), p.K),
        cost=partial(encode_cost, decoded=True),
        backward=partial(encode_backward, decoded=True),
        torch=autoencoder_torch,
    ),
    Op(
        run=ours.encode_topk_batch,
        make=lambda p: (*encoder(p), p.N * p.K),
        cost=encode_cost,
        backward=encode_backward,
        torch=lambda x, W, b, k_total: batch_torch(linear(x, W, b), k_total),
    ),
    Op(
        run=ours.topk_batch,
        make=lambda p: ((pre := pre_activations(p)), len(pre) * p.K),
        cost=elementwise,
        backward=elementwise_backward,
        torch=batch_torch,
    ),
    rational_op("", dense=False),
    rational_op("every latent", dense=True),
    jumprelu_op(ours.jumprelu, jumprelu_reference, 2),
    jumprelu_op(ours.jumprelu_l0, jumprelu_l0_reference, 1),
    rotation_op("support"),
    rotation_op("dense"),
]


def chosen_ops(names: list[str] | None, backward: bool) -> list[Op]:
    """The entries of the named functions, or all; ValueError for a name that there is not."""
    functions = list(dict.fromkeys(op.function for op in OPS))
    if unknown := set(names or ()) - {*functions}:
        raise ValueError(f"ops are {', '.join(functions)}: got {', '.join(sorted(unknown))}")
    found = [op for op in OPS if op.function in (names or functions)]
    if backward:
        found = [op for op in found if op.backward is not None]
        if not found:
            raise ValueError(f"{', '.join(names or ())} has no gradient of its own to time")
    return found
