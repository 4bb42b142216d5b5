"""Ops for sparse autoencoders: Triton kernels on GPUs, and fast PyTorch paths on CPUs.

The package needs torch, and triton only when a kernel runs. It imports nothing of fastsae.
`__all__` lists the differentiable ops. The other names are for training loops and for fastsae.
"""

from ._launch import buffer_bytes as buffer_bytes
from ._launch import rows_at_a_time as rows_at_a_time
from .adam import WIDEST as WIDEST
from .adam import AdamStep as AdamStep
from .adam import BiasGradients as BiasGradients
from .adam import RowGradients as RowGradients
from .adam import Rows as Rows
from .adam import Window as Window
from .adam import adam_ as adam_
from .adam import flush_ as flush_
from .center import center as center
from .center import nonzero_variance as nonzero_variance
from .dense_adam import dense_adam_ as dense_adam_
from .dense_adam import normalize_rows_ as normalize_rows_
from .dense_adam import remove_parallel_ as remove_parallel_
from .dense_adam import scalars_of as scalars_of
from .encode import Shadow as Shadow
from .encode import candidates as candidates
from .encode import encode_topk
from .encode import encode_topk_each as encode_topk_each
from .encode import straight_through as straight_through
from .encode_above import Ragged as Ragged
from .encode_above import encode_above
from .encode_above import in_rows as in_rows
from .encode_decode import encode_decode
from .float8 import float8_pays as float8_pays
from .float8 import quantize_rows as quantize_rows
from .float8 import why_not_float8 as why_not_float8
from .int8 import balance as balance
from .int8 import quantize_int8 as quantize_int8
from .int8 import why_not_int8 as why_not_int8
from .jumprelu import jumprelu, jumprelu_l0
from .latent_major import latent_major as latent_major
from .listing import list_above as list_above
from .loss import squared_error
from .product import has_bf16 as has_bf16
from .proof import bfloat16_pays as bfloat16_pays
from .rational import rational
from .sparse import decode, gather_dot, scatter_outer
from .topk import By as By
from .topk import check_by as check_by
from .topk import topk
from .topk import topk_indices as topk_indices
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
