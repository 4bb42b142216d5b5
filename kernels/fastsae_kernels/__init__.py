"""Triton kernels for sparse autoencoders. Floor 0: imports torch and triton, nothing of fastsae."""

from .encode import encode_topk
from .encode_decode import encode_decode
from .jumprelu import jumprelu, jumprelu_l0
from .loss import squared_error
from .rational import rational
from .sparse import decode, gather_dot, scatter_outer
from .topk import topk

__all__ = [
    "decode",
    "encode_decode",
    "encode_topk",
    "gather_dot",
    "jumprelu",
    "jumprelu_l0",
    "rational",
    "scatter_outer",
    "squared_error",
    "topk",
]
