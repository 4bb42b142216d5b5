"""Triton kernels for sparse autoencoders, and the same ops on CPUs, where Triton is not needed.

Floor 0: imports torch, and triton when a kernel runs; nothing of fastsae. `__all__` names the
differentiable ops; the other names serve training loops and modules that build on ours.
"""

# ruff: noqa: F401
from ._launch import buffer_bytes, rows_at_a_time
from .adam import WIDEST, AdamStep, BiasGradients, RowGradients, Rows, Window, adam_, settle_
from .center import center
from .dense_adam import fused_adam_, normalise_rows_, remove_parallel_, scalars_of
from .encode import Shadow, encode_topk, encode_topk_each, straight_through
from .encode_above import Ragged, encode_above, in_rows, list_above
from .encode_decode import encode_decode
from .float8 import float8_pays, quantize_rows, why_not_float8
from .int8 import balance, quantize_int8, why_not_int8
from .jumprelu import jumprelu, jumprelu_l0
from .latent_major import latent_major
from .loss import squared_error
from .product import has_bf16
from .rational import rational
from .sparse import decode, gather_dot, scatter_outer
from .topk import By, check_by, topk, topk_indices
from .topk_batch import encode_topk_batch, topk_batch

__all__ = [
    "decode",
    "encode_above",
    "encode_decode",
    "encode_topk",
    "encode_topk_batch",
    "gather_dot",
    "jumprelu",
    "jumprelu_l0",
    "rational",
    "scatter_outer",
    "squared_error",
    "topk",
    "topk_batch",
]
