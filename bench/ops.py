"""Every op that is timed: its arguments, its least cost, and the same computation in plain PyTorch.

To add an op, add an entry to OPS, which `python -m bench kernels` and the GPU benchmark both read.
A cost counts every input as read once and every output as written once; indices take 8 bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, linear

import fastsae_kernels as ours
from fastsae.train.optim import Optimizer
from fastsae_kernels.adam import AdamStep, RowGradients, Rows, Window, adam_
from fastsae_kernels.center import center, center_reference
from fastsae_kernels.float8 import quantize_reference, quantize_rows
from fastsae_kernels.jumprelu import jumprelu_l0_reference, jumprelu_reference
from fastsae_kernels.latent_major import latent_major
from fastsae_kernels.rational import rational_reference
from fastsae_kernels.rescore import rescore, rescore_reference
from fastsae_kernels.rotation import rotation_gradients
from fastsae_kernels.sparse import gather_dot_reference, scatter_outer_reference

from .dense import dense_codes, rotation_dense
from .problem import Problem, check_names, precision
from .roofs import Cost

fp32, bf16 = torch.float32, torch.bfloat16
Make = Callable[[Problem], tuple]


@dataclass(frozen=True)
class Op:
    """An op of the kernel benchmark."""

    run: Callable[..., Any]
    """The public function, or a wrapper of it."""
    make: Make
    """Builds the arguments for a problem."""
    cost: Callable[..., Cost]
    """The least cost, from the problem, whether to add gradients (0 or 1), and the arguments."""
    torch: Callable[..., Any]
    """The same computation in plain PyTorch."""
    gradients: bool = True
    """Whether the op is differentiable."""
    step: bool = False
    """Whether training steps use the op."""
    called: str = ""
    """The function's name, if `run` is a wrapper."""
    variant: str = ""
    """Distinguishes several entries of one function."""
    torch_make: Make | None = None
    """Builds the arguments of the PyTorch version, if they differ."""

    @property
    def function(self) -> str:
        return self.called or self.run.__name__

    @property
    def name(self) -> str:
        return f"{self.function}, {self.variant}" if self.variant else self.function


# --- encoders -------------------------------------------------------------------------------


def encoder(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    return p.normal(p.N, p.D), p.weights(), p.normal(p.F, std=0.1)


def encode_cost(p: Problem, back: int, *_: Any, parts: int = 1) -> Cost:
    """Cost of an encoder, or with parts=2 of an encoder and its decoder.

    The backward pass reads tokens and weights again and writes a gradient of each.
    """
    item, entries = p.dtype.itemsize, p.N * p.K
    moved = (1 + 2 * back) * parts * item * (p.N + p.F) * p.D + (8 + item) * entries
    sparse = (2 * back * parts + parts - 1) * 2 * entries * p.D
    return Cost(moved, 2 * p.N * p.F * p.D + sparse, precision(p))


def above_threshold(p: Problem) -> tuple:
    """Encoder inputs, and a threshold that about K of F pre-activations exceed."""
    threshold = -float(torch.special.ndtri(torch.tensor(min(p.K / p.F, 0.5))))
    return *encoder(p), torch.full((p.F,), threshold, device=p.device)


def above_torch(x: Tensor, W: Tensor, b: Tensor, threshold: Tensor) -> Tensor:
    """encode_above with dense codes."""
    h = linear(x, W, b)
    return h.where(h > threshold, 0.0)


def topk_torch(x: Tensor, W: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, indices = linear(x, W, b).topk(k)
    return values.relu(), indices


def batch_torch(pre: Tensor, k_total: int) -> Tensor:
    """topk_batch with dense codes."""
    values, position = pre.flatten().topk(k_total)
    return torch.zeros_like(pre).flatten().scatter(0, position, values.relu()).view_as(pre)


def autoencoder_torch(x: Tensor, W: Tensor, b: Tensor, V: Tensor, c: Tensor, k: int) -> Tensor:
    return dense_codes(linear(x, W, b), k) @ V + c


def pre_activations(p: Problem) -> Tensor:
    """Pre-activations of one chunk of tokens."""
    return p.normal(p.chunk(), p.F)


def elementwise(p: Problem, back: int, h: Tensor, *_: Any, outputs=1, flops=1) -> Cost:
    """Cost of reading h and writing `outputs` tensors of its size, at `flops` per entry.

    The backward pass reads h and the gradients of the outputs, and writes one tensor.
    """
    tensors = 1 + outputs + back * (2 + outputs)
    return Cost(tensors * h.nbytes, (1 + 3 * back) * flops * h.numel())


# --- sparse products ------------------------------------------------------------------------


def sparse_cost(p: Problem, back: int, *arguments: Any, rows: float = 1, products=1) -> Cost:
    """Cost of products of codes with the rows of W that they pick; tokens are read `rows` times.

    The backward pass reads tokens and rows again and writes a dense gradient of W.
    """
    item, entries = p.dtype.itemsize, p.N * p.K
    indices = next(a for a in arguments if isinstance(a, Tensor) and a.dtype == torch.int64)
    touched = int(torch.bincount(indices.flatten(), minlength=p.F).count_nonzero())
    read = touched + rows * p.N + back * 2 * (p.N + p.F)
    moved = item * read * p.D + (8 + item) * entries
    flops = (products + 2 * back) * 2 * entries * p.D
    return Cost(moved, flops, gathered=item * entries * p.D)


def outer_cost(p: Problem, back: int, *_: Any) -> Cost:
    item, entries = p.dtype.itemsize, p.N * p.K
    moved = (1 + back) * item * (p.N + p.F) * p.D + (8 + item) * entries
    return Cost(moved, (1 + 2 * back) * 2 * entries * p.D, gathered=item * entries * p.D)


def decode_torch(values: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    return embedding_bag(indices, W, per_sample_weights=values, mode="sum")


def error_torch(values: Tensor, indices: Tensor, W: Tensor, b: Tensor, target: Tensor) -> tuple:
    """squared_error; the error and the dot products are constants."""
    error = decode_torch(values, indices, W) + b - target
    low = error.detach().to(W.dtype)
    return error.square().sum(1), low, gather_dot_reference(low, indices, W.detach())


# --- Adam -----------------------------------------------------------------------------------


def adam_inputs(p: Problem, options: Optimizer) -> tuple:
    """Both weights with their moments, and gradients from random codes."""
    rows, T = [], options.adam_window
    for W in (p.weights(fp32), p.weights(fp32)):
        first = p.normal(p.F, p.D, dtype=bf16 if options.adam_moments == "bf16" else fp32, std=1e-3)
        second = first.square()
        if options.adam_second == "row":
            second = second.float().mean(1, keepdim=True)
        rows.append(Rows(W, first, second, W.bfloat16()))
    (values, indices), d_values = p.codes(fp32), p.normal(p.N, p.K, dtype=fp32)
    runs = latent_major(indices, p.F)
    v, d_v = (t.flatten()[runs.entry] for t in (values, d_values))
    gradients = RowGradients(runs, v, p.normal(p.N, p.D), d_v, p.normal(p.N, p.D))
    updated = torch.zeros(p.F, dtype=torch.int32, device=p.device)
    window = Window(updated, torch.zeros(T, device=p.device)) if T > 1 else None
    return *rows, gradients, window, [0]


def adam_step(decoder: Rows, encoder: Rows, g: RowGradients, window: Any, step: list[int]) -> None:
    step[0] += 1
    adam_(decoder, encoder, g, AdamStep(step[0], 1e-5), window)


def adam_cost(p: Problem, back: int, decoder: Rows, encoder: Rows, g: RowGradients, window, _):
    """Cost of an Adam step that visits rows without a gradient every T-th time."""
    busy = int((g.runs.start.diff() > 0).sum())
    visited = busy + (p.F - busy) / (len(window.history) if window else 1)
    item, entries = p.dtype.itemsize, p.N * p.K
    moments = sum(m.nbytes for m in decoder[1:3]) / decoder.weight.numel()
    moved = 2 * adam_bytes(moments) * visited * p.D + 2 * item * p.N * p.D
    return Cost(moved, 4 * entries * p.D, gathered=2 * item * entries * p.D)


def adam_bytes(moments: float) -> float:
    """Bytes per parameter: it and its moments, read and written, and a written bfloat16 copy."""
    return 2 * (4 + moments) + 2


def dense_adam_inputs(p: Problem) -> tuple:
    """torch.optim.Adam with state for two weights, and their dense gradients."""
    weights = [p.weights(fp32) for _ in range(2)]
    for W in weights:
        W.grad = p.normal(p.F, p.D, dtype=fp32)
    adam = torch.optim.Adam(weights, lr=1e-5, fused=True)
    adam.step()
    return adam, *weights, *(W.grad for W in weights)


def adam_op(variant: str, **options: Any) -> Op:
    make = partial(adam_inputs, options=Optimizer(**options))
    kind = False, True, "adam_", variant, dense_adam_inputs
    return Op(adam_step, make, adam_cost, lambda adam, *_: adam.step(), *kind)


# --- activations and the rotation trick -----------------------------------------------------


def rational_inputs(p: Problem, dense: bool) -> tuple:
    h = pre_activations(p) if dense else p.normal(p.N, p.K)
    scalars = (torch.tensor(c, device=p.device) for c in (2.5, 0.9, 0.1))
    return h, p.normal(10, dtype=fp32), p.normal(8, dtype=fp32, std=0.3), *scalars


def rational_op(variant: str, dense: bool) -> Op:
    make, cost = partial(rational_inputs, dense=dense), partial(elementwise, flops=34)
    return Op(ours.rational, make, cost, rational_reference, variant=variant)


def jumprelu_inputs(p: Problem) -> tuple:
    return pre_activations(p), p.normal(p.F).abs(), 0.3


def rotation_inputs(p: Problem, mode: str) -> tuple:
    data = encoder(p)
    codes = ours.encode_topk(*data, p.K)
    return *data, p.weights(), *codes, p.normal(p.N, p.D), p.normal(p.N, p.K), mode, (True,) * 3


def rotation_cost(p: Problem, back: int, *arguments: Any) -> Cost:
    """Cost of the cheaper algorithm; reads both weights and writes three gradients."""
    factor = 4 if arguments[-2] == "dense" else 1  # as many products as |h|^2 alone takes
    gram, dense = 2 * factor * (p.F + p.N) * p.D**2, 2 * factor * p.N * p.F * p.D
    return Cost(3 * p.dtype.itemsize * (p.F + p.N) * p.D, min(gram, dense), precision(p))


def rotation_op(mode: str) -> Op:
    make = partial(rotation_inputs, mode=mode)
    return Op(rotation_gradients, make, rotation_cost, rotation_dense, False, variant=mode)


# --- the table ------------------------------------------------------------------------------

OPS: list[Op] = [
    Op(ours.encode_topk, lambda p: (*encoder(p), p.K), encode_cost, topk_torch, step=True),
    Op(ours.topk, lambda p: (pre_activations(p), p.K),
       partial(elementwise, outputs=0), torch.topk, step=True),
    Op(ours.squared_error, lambda p: (*p.codes(), p.weights(), p.normal(p.D, dtype=fp32),
       p.normal(p.N, p.D, dtype=fp32)), partial(sparse_cost, rows=3, products=2), error_torch,
       step=True),
    Op(center, lambda p: (p.normal(p.N, p.D, dtype=fp32), p.normal(p.D, dtype=fp32), p.dtype),
       lambda p, *_: Cost((4 + p.dtype.itemsize) * p.N * p.D, 9 * p.N * p.D), center_reference,
       False, step=True),
    Op(latent_major, lambda p: (p.indices(), p.F),
       lambda p, *_: Cost(p.N * p.K * (8 + 8 + 4 + 4) + 4 * p.F),
       lambda indices, F: indices.flatten().sort(stable=True), False, step=True),
    adam_op(""),
    adam_op("second moment per row", adam_second="row"),
    adam_op("bf16 moments", adam_moments="bf16"),
    adam_op("bf16 moments and window 8", adam_moments="bf16", adam_window=8),
    Op(ours.decode, lambda p: (*p.codes(), p.weights()), sparse_cost, decode_torch),
    Op(ours.gather_dot, lambda p: (p.normal(p.N, p.D), p.indices(), p.weights()), sparse_cost,
       gather_dot_reference),
    Op(ours.scatter_outer, lambda p: (*p.codes(), p.normal(p.N, p.D), p.F), outer_cost,
       scatter_outer_reference),
    Op(rescore, lambda p: (*encoder(p), p.indices(), p.K // 2 or 1), sparse_cost,
       rescore_reference, False, step=True),
    Op(quantize_rows, lambda p: (p.weights(),),
       lambda p, *_: Cost((p.dtype.itemsize + 1) * p.F * p.D), quantize_reference, False,
       step=True),
    Op(ours.encode_above, above_threshold, encode_cost, above_torch),
    Op(ours.encode_decode, lambda p: (*encoder(p), p.weights(), p.normal(p.D), p.K),
       partial(encode_cost, parts=2), autoencoder_torch),
    Op(ours.encode_topk_batch, lambda p: (*encoder(p), p.N * p.K), encode_cost,
       lambda x, W, b, k_total: batch_torch(linear(x, W, b), k_total)),
    Op(ours.topk_batch, lambda p: (pre_activations(p), p.chunk() * p.K),
       partial(elementwise, outputs=0), batch_torch),
    rational_op("", dense=False),
    rational_op("every latent", dense=True),
    Op(ours.jumprelu, jumprelu_inputs, elementwise, jumprelu_reference),
    Op(ours.jumprelu_l0, jumprelu_inputs, partial(elementwise, outputs=0), jumprelu_l0_reference),
    rotation_op("support"),
    rotation_op("dense"),
]  # fmt: skip


def chosen_ops(names: list[str] | None, backward: bool) -> list[Op]:
    """Entries of the named functions, or all of them. Raises ValueError for unknown names."""
    functions = list(dict.fromkeys(op.function for op in OPS))
    check_names("ops", names, functions)
    chosen = [op for op in OPS if op.function in (names or functions)]
    found = [op for op in chosen if op.gradients or not backward]
    if not found:
        raise ValueError(f"{', '.join(names or ())} has no gradient: omit --backward")
    return found
