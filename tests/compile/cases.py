"""What ships: functions that launch kernels, and the shapes and dtypes they are called with.

A new function, or other arguments of one, need one line in CASES.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from unittest.mock import patch

import torch

from fastsae_kernels import _launch, decode, encode_topk, gather_dot, scatter_outer, squared_error
from fastsae_kernels._encode_above_kernel import launch_count, launch_list
from fastsae_kernels.adam import AdamStep, RowGradients, Rows, Window, adam_
from fastsae_kernels.center import center
from fastsae_kernels.float8 import FIRST_CAPABILITY, quantize_rows
from fastsae_kernels.jumprelu import _jumprelu_backward, jumprelu, jumprelu_l0
from fastsae_kernels.latent_major import latent_major
from fastsae_kernels.rational import _rational_backward, rational
from fastsae_kernels.rotation import rotation_gradients
from fastsae_kernels.topk import By, topk_indices, write_topk

torch.backends.cuda.matmul.fp32_precision = "tf32"  # the encoder's kernel has no other for fp32

fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16


class Inputs:
    """Tensors of one shape without memory: N tokens, D width, F latents, K active."""

    def __init__(self, N: int, D: int, F: int, K: int, dtype: torch.dtype):
        self.empty = partial(torch.empty, dtype=dtype, device="meta")
        self.F, self.K = F, K
        self.x, self.b_dec = self.empty(N, D), self.empty(D)
        self.W, self.b_enc = self.empty(F, D), self.empty(F)
        self.pre, self.values, self.entries = self.empty(N, F), self.empty(N, K), self.empty(N * K)
        self.encoder = self.x, self.W, self.b_enc, K
        self.indices = self.empty(N, K, dtype=torch.int64)
        self.thresholds, self.rows = self.empty(F, dtype=fp32), self.indices[:, 0]
        self.one = one = self.empty((), dtype=fp32)
        self.rational = self.empty(10, dtype=fp32), self.empty(8, dtype=fp32), one, one


def _encode(s: Inputs, by: By = "value") -> None:
    """The product by our kernel."""
    with patch("fastsae_kernels.encode.ENCODER", "triton"):
        encode_topk(*s.encoder, by)


def _encode_fp8(s: Inputs) -> None:
    """What ranks the candidates of a product in fp8."""
    encode_topk(*s.encoder, shadow=quantize_rows(s.W))


def _adam(
    s: Inputs,
    moments: torch.dtype = fp32,
    T: int = 1,
    extra: int = 0,
    shadow: bool = True,
    float8: bool = False,
    per_row: bool = False,
) -> None:
    """One step on weights in fp32, from tokens in the dtype of the inputs."""
    W = torch.empty_like(s.W, dtype=fp32)
    m = torch.empty_like(W, dtype=moments)
    v = torch.empty_like(W[:, :1]) if per_row else m
    rows = Rows(W, m, v, torch.empty_like(W, dtype=bf16) if shadow else None)
    if float8 and _launch.capability(W) >= FIRST_CAPABILITY:
        rows = rows._replace(quantized=quantize_rows(W))
    more = s.empty(extra, W.shape[1], dtype=fp32)
    more = (s.empty(extra, dtype=torch.int64), more, more) if extra else None
    window = Window(s.empty(s.F, dtype=torch.int32), s.empty(T, dtype=fp32)) if T > 1 else None
    runs = latent_major(s.indices, s.F)
    gradients = RowGradients(runs, s.entries, s.x, s.entries, s.x, more)
    adam_(rows._replace(quantized=None), rows, gradients, AdamStep(1, 1e-3), window)


def _rotation(s: Inputs, need_x: bool = True) -> None:
    """By the algorithm that has a kernel, whichever is cheaper."""
    code = s.values, s.indices, s.x, s.values
    with patch("fastsae_kernels.rotation.gram_is_cheaper", lambda *_: True):
        rotation_gradients(s.x, s.W, s.b_enc, s.W, *code, "dense", (need_x, False, False))


A = 8192, 4096, 131072, 64
B = 8192, 2048, 32768, 32
C = 16384, 768, 24576, 32
D = 4096, 4096, 1048576, 128
ODD = 77, 33, 1001, 7

REAL = {
    "A fp32": Inputs(*A, fp32),
    "A bf16": Inputs(*A, bf16),
    "B fp32": Inputs(*B, fp32),
    "B bf16": Inputs(*B, bf16),
    "C fp32": Inputs(*C, fp32),
    "C bf16": Inputs(*C, bf16),
    "C fp16": Inputs(*C, fp16),
    "D fp32": Inputs(*D, fp32),
    "D bf16": Inputs(*D, bf16),
}
"""What timings are given for: rows begin at multiples of 16 bytes."""

AWKWARD = {
    "odd fp32": Inputs(*ODD, fp32),
    "odd bf16": Inputs(*ODD, bf16),
    "k=1": Inputs(100, 1000, 4096, 1, bf16),
    "k=1000": Inputs(64, 1000, 40000, 1000, fp32),
    "wide": Inputs(64, 8192, 4096, 32, bf16),
    "wide fp32": Inputs(64, 5120, 4096, 32, fp32),
    "k=200": Inputs(64, 2304, 40000, 200, bf16),
    "k=500": Inputs(64, 528, 40000, 500, fp32),
    "d_in=1": Inputs(64, 1, 4096, 32, bf16),
    "all 1": Inputs(1, 1, 1, 1, fp32),
}

EVERY = {**REAL, **AWKWARD}
LARGE = {*REAL, "odd fp32", "odd bf16", "k=500"}
FEW = {"A fp32", "A bf16", "C bf16", "odd fp32", "wide", "wide fp32"}
TWO = {"A bf16", "odd fp32"}

Call = Callable[[Inputs], object]

CASES: dict[str, tuple[Iterable[str], Call]] = {
    "center": (EVERY, lambda s: center(s.x, s.b_dec, bf16)),
    "decode": (EVERY, lambda s: decode(s.values, s.indices, s.W)),
    "gather_dot": (EVERY, lambda s: gather_dot(s.x, s.indices, s.W)),
    "scatter_outer": (EVERY, lambda s: scatter_outer(s.values, s.indices, s.x, s.F)),
    "squared_error": (EVERY, lambda s: squared_error(s.values, s.indices, s.W, s.b_dec, s.x)),
    "topk": (EVERY, lambda s: write_topk(s.pre, s.K, "value", s.values, s.indices)),
    "topk abs": (TWO, lambda s: write_topk(s.pre, s.K, "abs", s.values, s.indices)),
    "topk indices": (TWO, lambda s: topk_indices(s.pre, s.K)),
    "encode": (LARGE, _encode),
    "encode abs": (TWO, lambda s: _encode(s, "abs")),
    "encode fp8": ({"A bf16", "D bf16"}, _encode_fp8),
    "encode shadow": ({"A fp32"}, lambda s: encode_topk(*s.encoder, shadow=s.W.bfloat16())),
    "above": (FEW, lambda s: launch_count(s.pre, s.thresholds, "value")),
    "above abs": (TWO, lambda s: launch_count(s.pre, s.thresholds, "abs")),
    "above list": (FEW, lambda s: launch_list(s.pre, s.thresholds, "value", s.rows, 1)),
    "above list abs": (TWO, lambda s: launch_list(s.pre, s.thresholds, "abs", s.rows, 1)),
    "adam": ({*FEW, "B bf16", "k=1", "k=1000", "all 1"}, _adam),
    "adam extra": (TWO, lambda s: _adam(s, extra=64)),
    "adam fp8": ({"A bf16", "C bf16"}, lambda s: _adam(s, bf16, T=8, float8=True)),
    "adam bare": ({"A fp32", "odd fp32"}, lambda s: _adam(s, shadow=False)),
    "adam per row": (TWO, lambda s: _adam(s, per_row=True)),
    "adam per row fp8": (
        {"C bf16"},
        lambda s: _adam(s, bf16, T=8, float8=True, per_row=True),
    ),
    "adam window": ({*FEW, "B bf16", "C bf16"}, lambda s: _adam(s, bf16, T=8)),
    "adam window extra": (TWO, lambda s: _adam(s, bf16, T=8, extra=64)),
    "rational": (FEW, lambda s: rational(s.values, *s.rational)),
    "rational row": (TWO, lambda s: rational(s.pre, *s.rational, s.b_enc)),
    "rational'": (FEW, lambda s: _rational_backward(s.values, s.values, *s.rational, s.one, fp32)),
    "rational' row": (TWO, lambda s: _rational_backward(s.pre, s.pre, *s.rational, s.b_enc, fp32)),
    "jumprelu": (FEW, lambda s: jumprelu(s.pre, s.b_enc, 1e-3)),
    "jumprelu l0": (TWO, lambda s: jumprelu_l0(s.pre, s.b_enc, 1e-3)),
    "jumprelu'": (FEW, lambda s: _jumprelu_backward(s.pre, s.pre, s.b_enc, 1e-3, False)),
    "jumprelu' l0": (TWO, lambda s: _jumprelu_backward(s.pre[:, 0], s.pre, s.b_enc, 1e-3, True)),
    "rotation dense": (EVERY, _rotation),
    "rotation weights": (TWO, lambda s: _rotation(s, False)),
}
"""Where each is compiled: at every shape, or where its arguments or its price suggest."""


def cases() -> Iterator[tuple[str, str, Callable[[], object]]]:
    """Name, shape, and what to call."""
    for name, (shapes, call) in CASES.items():
        for shape, inputs in EVERY.items():
            if shape in shapes:
                yield name, shape, partial(call, inputs)
