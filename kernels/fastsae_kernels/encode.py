"""Linear encoder with exact top-k selection, without storing all pre-activations.

    h = x W_enc^T + b_enc
    encode_topk(x, W_enc, b_enc, k)            max(h, 0) at the k largest h        (TopK)
    encode_topk(x, W_enc, b_enc, k, by="abs")  h at the k largest |h|              (AbsTopK)

The GEMM runs over chunks of tokens whose pre-activations fit in `FASTSAE_BUFFER_MB`, and top-k
selects from each chunk while it is in the cache. On a GPU the GEMM is cuBLAS's, and selection reads
the chunk once; or it is our kernel, which also finds the maxima of groups, so that selection reads
only the best groups. The gradients are the sparse products of sparse.py.
Shapes: N tokens, K kept, F latents, D model width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from ._launch import ENCODER, capability, check_devices, check_shape, rows_at_a_time, use_triton
from ._op import register
from .float8 import E4M3, Float8Rows, scaled_product, why_not_float8
from .int8 import Int8Rows, int8_product, unsigned, why_not_int8
from .product import product, tokens_at_a_time
from .proof import bfloat16_pays, prepare, select_proved
from .rescore import rescore
from .sparse import decode, scatter_outer
from .topk import By, check_by, check_choice, largest_in_columns, topk_reference, write_topk

# --- reference: the specification -----------------------------------------------------------


def encode_topk_reference(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, by: By = "value"
) -> tuple[Tensor, Tensor]:
    """[N, D], [F, D], [F] -> [N, K], [N, K]"""
    return topk_reference(linear(x, W_enc, b_enc), k, by)


# --- GEMM and selection, a chunk of tokens at a time ----------------------------------------

TRITON_WINS: set[tuple[int, int, int]] = set()
"""(major compute capability, d_in, d_sae) where our GEMM with fused maxima beats cuBLAS and a
separate pass, as measured by `python -m bench gpu`: none yet."""


def _fuses_maxima(x: Tensor, F: int, k: int) -> bool:
    """Whether our GEMM runs instead of cuBLAS; it computes the groups' maxima in its epilogue."""
    if not use_triton(x):
        return False
    from ._encode_kernel import can_encode

    if not can_encode(x, F, k):
        return False
    wins = (capability(x)[0], x.shape[1], F) in TRITON_WINS
    return ENCODER == "triton" or (wins and ENCODER is None)


def in_bfloat16(x: Tensor, W: Tensor, k: int) -> bool:
    """Whether a bfloat16 GEMM may find candidates, with a bound on its errors, where a token keeps
    about k entries."""
    eligible = x.device.type == "cpu" and x.dtype == torch.float32 and not use_triton(x)
    eligible = eligible and len(x) > 0 and len(W) > 0
    return eligible and bfloat16_pays(len(x), len(W), k)


def _select(x: Tensor, W: Tensor, b: Tensor, k: int, by: By) -> tuple[Tensor, Tensor]:
    """Values and indices as of topk: [N, D], [F, D], [F] -> [N, K], [N, K]."""
    W = W.contiguous()
    low = prepare(x, W, b, k, by) if in_bfloat16(x, W, k) else None
    if low is None:
        return _select_directly(x, W, b, k, by)
    values, indices, left = select_proved(x, W, b, low, k, by)
    if len(left):
        values[left], indices[left] = _select_directly(x[left], W, b, k, by)
    return values, indices


def _select_directly(x: Tensor, W: Tensor, b: Tensor, k: int, by: By) -> tuple[Tensor, Tensor]:
    N, F = x.shape[0], W.shape[0]
    values = x.new_empty(N, k)
    indices = torch.empty(N, k, dtype=torch.int64, device=x.device)
    x, W, b = x.contiguous(), W.contiguous(), b.contiguous()  # oneDNN's operator ignores strides
    with_maxima = _fuses_maxima(x, F, k)
    chunk = tokens_at_a_time(x, F)
    for start in range(0, N, chunk):
        rows = slice(start, min(start + chunk, N))
        if with_maxima:
            from ._encode_kernel import launch_encode
            from ._topk_kernel import launch_topk

            pre, maxima, tile = launch_encode(x[rows], W, b, by)
            launch_topk(pre, k, by, values[rows], indices[rows], maxima, tile)
            del maxima
        else:
            pre = product(x[rows], W, b)
            write_topk(pre, k, by, values[rows], indices[rows])
        del pre  # before the next chunk is allocated: the budget is for one
    return values, indices


# --- low-precision candidates, which are ranked again exactly --------------------------------

Shadow = Tensor | Float8Rows | Int8Rows
"""A low-precision copy of the encoder, whose GEMM proposes candidates."""

MARGINS = {torch.bfloat16: 0.5, torch.int8: 0.5, E4M3: 1.0}
"""Candidates beyond k, as multiples of k, by the shadow's dtype. In all our measurements, 1.5 k
candidates from bfloat16 contained every active entry, and 1.5 k from int8 with balanced columns or
2 k from fp8 at least 99.999 % (bench/results/recall-cpu.json; outlier dimensions are hardest)."""


def candidates_for(k: int, F: int, shadow: torch.dtype) -> int:
    """How many candidates a shadow of this dtype proposes."""
    return min(k + max(8, int(MARGINS[shadow] * k)), F)


def candidates(x: Tensor, shadow: Shadow, b: Tensor, k: int, by: By) -> Tensor:
    """Latents that a shadow proposes for the k largest pre-activations: [N, D], [F] -> [N, C].

    C is `candidates_for(k, ...)`, in any order. In fp8, ties go to the lowest latent, so that equal
    rows of W, which are equal in fp8 too, are ranked correctly. Others break ties arbitrarily.
    """
    N, F = len(x), len(b)
    k = candidates_for(k, F, (shadow[0] if isinstance(shadow, tuple) else shadow).dtype)
    found = torch.empty(N, k, dtype=torch.int64, device=x.device)
    low, bias = x.to(torch.bfloat16).contiguous(), b.to(torch.bfloat16).contiguous()
    shifted = unsigned(shadow) if isinstance(shadow, Int8Rows) else None
    chunk = tokens_at_a_time(low, F) if shifted is None else rows_at_a_time(low, F)
    for start in range(0, N, chunk):
        rows = slice(start, min(start + chunk, N))
        if isinstance(shadow, Int8Rows):
            pre = int8_product(x[rows], shadow, b, shifted)
            found[rows] = largest_in_columns(pre.abs_() if by == "abs" else pre, k)
        elif isinstance(shadow, Float8Rows):
            pre = scaled_product(low[rows], shadow, bias)
            write_topk(pre, k, by, None, found[rows])
        else:
            pre = product(low[rows], shadow.contiguous(), bias)
            write_topk(pre, k, by, None, found[rows], "any")
        del pre  # before the next chunk is allocated: the budget is for one
    return found


# --- autograd -------------------------------------------------------------------------------


class _EncodeTopk(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, by: str,
        shadow: Tensor | None, scale: Tensor | None, columns: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if shadow is None:
            return _select(x, W_enc, b_enc, k, by)
        copy = shadow
        if scale is not None and columns is not None:
            copy = Int8Rows(shadow, scale, columns)
        elif scale is not None:
            copy = Float8Rows(shadow, scale)
        return rescore(x, W_enc, b_enc, candidates(x, copy, b_enc, k, by), k, by)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, W_enc, *_ = inputs
        ctx.save_for_backward(x, W_enc, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, g, _):  # g: [N, K]
        x, W_enc, values, indices = ctx.saved_tensors
        g = g.where(values != 0, 0.0)
        gradients = straight_through(g, x, W_enc, indices, ctx.needs_input_grad[:3])
        return *gradients, None, None, None, None, None


def straight_through(
    g: Tensor, x: Tensor, W_enc: Tensor, indices: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, W_enc and b_enc from g [N, K], the gradient of the kept pre-activations."""
    need_x, need_W, need_b = needs
    F, ones = W_enc.shape[0], x.new_ones(x.shape[0], 1)
    return (
        decode(g, indices, W_enc) if need_x else None,
        scatter_outer(g, indices, x, F) if need_W else None,
        scatter_outer(g, indices, ones, F)[:, 0] if need_b else None,
    )


def _fake(x, W_enc, b_enc, k, by, shadow, scale, columns):
    N = x.shape[0]
    return x.new_empty(N, k), x.new_empty(N, k, dtype=torch.int64)


_encode_topk = register(_EncodeTopk, _fake)


# --- public ---------------------------------------------------------------------------------


def check_encoder(x: Tensor, W_enc: Tensor, b_enc: Tensor, by: By = "value") -> None:
    """Raise ValueError unless x, W_enc and b_enc match and `by` is valid."""
    check_shape("x", x, None, None)
    check_shape("W_enc", W_enc, None, x.shape[1])
    check_shape("b_enc", b_enc, W_enc.shape[0])
    check_by(by)
    if not x.dtype == W_enc.dtype == b_enc.dtype:
        raise ValueError(
            f"x, W_enc and b_enc must have one dtype, got {x.dtype}, {W_enc.dtype}, {b_enc.dtype}"
        )
    check_devices(x=x, W_enc=W_enc, b_enc=b_enc)


def encode_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    by: By = "value",
    *,
    shadow: Shadow | None = None,
) -> tuple[Tensor, Tensor]:
    """Encode tokens and keep the k largest pre-activations of each, exactly.

    x [N, D] (already centered), W_enc [F, D], b_enc [F], one floating dtype -> values [N, K] in
    that dtype and indices [N, K] int64, largest first, ties to the lowest latent. by="value" is
    TopK (arXiv:2406.04093; values below 0 become 0), by="abs" AbsTopK (arXiv:2510.00404).
    Differentiable in x, W_enc and b_enc: an entry of value 0 gets no gradient.

    With `shadow`, a copy of W_enc in bfloat16 or of its rows in fp8 (`quantize_rows`) or int8
    (`quantize_int8`), the product runs in that precision and only proposes candidates (`MARGINS`
    says how many); their values are computed again from x and W_enc with sums in fp32, the k
    largest of those are kept, and rounded to x's dtype at the end. Exact unless a true member is
    not among the candidates. On a GPU, fp8 needs d_in and F to be multiples of 16
    (`why_not_float8`); on a CPU it is emulated. int8 is for CPUs, and emulated without VNNI.

    Costs 2 N F D FLOPs; no more than FASTSAE_BUFFER_MB of pre-activations exist at a time. On a CPU
    with bfloat16 instructions, the GEMM of float32 tensors is in bfloat16, and W_enc copied, where
    it pays and provably changes nothing (proof.py). With a shadow in bfloat16 or int8, a NaN in a
    row of W_enc may be missed. ValueError for wrong shapes or dtypes, or unless 1 <= k <= F.
    """
    check_encoder(x, W_enc, b_enc, by)
    check_choice(k, by, W_enc.shape[0])
    # Ops take only tensors, None where the kind of shadow lacks a part: fp8 has no columns.
    rows, scale, columns = (
        (*shadow, None)[:3] if isinstance(shadow, tuple) else (shadow, None, None)
    )
    check_shadow(W_enc, rows, scale, columns)
    return _encode_topk(x, W_enc, b_enc, k, by, rows, scale, columns)


def check_shadow(
    W_enc: Tensor, shadow: Tensor | None, scale: Tensor | None, columns: Tensor | None
) -> None:
    """Raise ValueError unless the shadow is a copy of W_enc that this device supports."""
    if shadow is None:
        return
    F, D = W_enc.shape
    if shadow.shape != W_enc.shape:
        raise ValueError(f"shadow must have the shape of W_enc, got {list(shadow.shape)}")
    wanted = torch.bfloat16 if scale is None else E4M3 if columns is None else torch.int8
    if shadow.dtype != wanted:
        raise ValueError(f"shadow must be {wanted}, got {shadow.dtype}")
    for name, part, size in (("scale", scale, F), ("columns", columns, D)):
        if part is not None and part.shape != (size,):
            raise ValueError(
                f"the shadow's {name} must have shape {[size]}, got {list(part.shape)}"
            )
    check_devices(W_enc=W_enc, shadow=shadow, scale=scale, columns=columns)
    if W_enc.is_cuda and scale is not None:
        int8 = columns is not None
        reason = why_not_int8("cuda") if int8 else why_not_float8(F, D, W_enc.device)
        if reason is not None:
            raise ValueError(f"{reason}: use a shadow in bfloat16, or none")


@torch.no_grad()
def encode_topk_each(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, choices: Sequence[tuple[int, By]]
) -> list[tuple[Tensor, Tensor]]:
    """encode_topk for S stacked encoders of F latents each, with a single GEMM, unless each is
    faster in bfloat16.

    x [N, D], W_enc [S F, D], b_enc [S F], one floating dtype, and for each encoder its (k, by)
    -> S pairs of values [N, K] in that dtype and indices [N, K] int64, as of encode_topk.
    Not differentiable. Costs 2 N S F D FLOPs; no more than FASTSAE_BUFFER_MB of pre-activations
    exist at a time. ValueError for wrong shapes or dtypes, or unless the choices divide the rows of
    W_enc.
    """
    check_encoder(x, W_enc, b_enc)
    N, S = len(x), len(choices)
    if not S or len(W_enc) % S:
        raise ValueError(f"W_enc must have a multiple of {S} rows, got {list(W_enc.shape)}")
    F = len(W_enc) // S
    for k, by in choices:
        check_choice(k, by, F)
    if all(in_bfloat16(x, W_enc[:F], k) for k, _ in choices):
        parts = zip(W_enc.split(F), b_enc.split(F), choices, strict=True)
        return [_select(x, W, b, k, by) for W, b, (k, by) in parts]
    found = []
    for k, _ in choices:
        found.append((x.new_empty(N, k), torch.empty(N, k, dtype=torch.int64, device=x.device)))
    x, W_enc = x.contiguous(), W_enc.contiguous()
    chunk = tokens_at_a_time(x, S * F)
    for start in range(0, N, chunk):
        rows = slice(start, min(start + chunk, N))
        pre = product(x[rows], W_enc, b_enc)
        for part, (k, by), (values, indices) in zip(pre.split(F, 1), choices, found, strict=True):
            write_topk(part, k, by, values[rows], indices[rows])
    return found
