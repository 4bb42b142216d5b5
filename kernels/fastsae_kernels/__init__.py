"""Triton kernels for sparse autoencoders, and the same ops on CPUs, where Triton is not needed.

Floor 0: imports torch, and triton when a kernel runs; nothing of fastsae.
"""

from .encode import encode_topk
from .encode_above import encode_above
from .encode_decode import encode_decode
from .jumprelu import jumprelu, jumprelu_l0
from .loss import squared_error
from .rational import rational
from .sparse import decode, gather_dot, scatter_outer
from .topk import topk
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
