"""Triton kernels for sparse autoencoders. Floor 0: imports torch and triton, nothing of fastsae."""

from .encode import encode_topk
from .sparse import decode, gather_dot, scatter_outer
from .topk import topk

__all__ = ["decode", "encode_topk", "gather_dot", "scatter_outer", "topk"]
