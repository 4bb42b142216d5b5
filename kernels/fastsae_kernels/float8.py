"""An encoder GEMM in fp8 with one scale per row, which proposes candidates for encode_topk.

    scale[n] = 2^(floor(log2 max_d |x[n, d]|) - 7)
    rows[n]  = e4m3(x[n] / scale[n])
    scaled_product(x, W, b)[n, f] = scale_x[n] * scale_W[f] * (rows_x[n] . rows_W[f]) + b[f]

e4m3 keeps 4 significant bits. Dividing by a power of two is exact, so torch and the kernels write
the same bits. The largest entry of a row is scaled to between 128 and 256, below e4m3's maximum of
448.
Shapes: N tokens, F latents, D model width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._launch import capability, rows_at_a_time, use_triton
from .topk import MAX_K

E4M3 = torch.float8_e4m3fn
EXPONENT_BITS = 0x7F800000  # of float32
SMALLEST_SCALE = 2.0**-100  # the inverses of this and of the largest scale are normal in float32
ALIGNMENT = 16  # in bytes, that tensor cores require of both dimensions of a matrix
FIRST_CAPABILITY = (8, 9)


class Float8Rows(NamedTuple):
    """A matrix in e4m3 with one scale per row."""

    rows: Tensor
    """float8_e4m3fn [F, D]"""
    scale: Tensor
    """float32 [F]"""


# --- reference: the specification -----------------------------------------------------------


def quantize_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """Finite [F, D] -> e4m3 [F, D], float32 [F]"""
    largest = x.abs().amax(1).float().clamp_min(2.0**-93)
    scale = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 8)
    return (x.float() / scale[:, None]).to(E4M3), scale


# --- torch path: what runs without a GPU ----------------------------------------------------


def _quantize_torch(x: Tensor, out: Float8Rows) -> None:
    step = rows_at_a_time(x, x.shape[1])  # in chunks, to avoid an fp32 copy of a whole dictionary
    for part, rows, scale in zip(*(t.split(step) for t in (x, *out)), strict=True):
        largest = torch.linalg.vector_norm(part, float("inf"), dim=1).float()
        power = (largest.view(torch.int32) & EXPONENT_BITS).view(torch.float32)
        torch.clamp(power * 2.0**-7, min=SMALLEST_SCALE, out=scale)
        rows.copy_(part / scale[:, None])


# --- public ---------------------------------------------------------------------------------


def quantize_rows(x: Tensor, out: Float8Rows | None = None) -> Float8Rows:
    """Quantize floating rows [F, D] to e4m3 with one scale per row; writes to `out` if given.

    The scale of a row with NaN or Inf is Inf. Finite rows have the same bits on every device.
    """
    x = x.contiguous()
    if out is None:
        scale = torch.empty(len(x), dtype=torch.float32, device=x.device)
        out = Float8Rows(torch.empty_like(x, dtype=E4M3), scale)
    if use_triton(x) and capability(x) >= FIRST_CAPABILITY and x.dtype != torch.float64:
        from ._float8_kernel import launch_quantize as run
    else:
        run = _quantize_torch
    run(x, out)
    return out


def scaled_product(x: Tensor, W: Float8Rows, b: Tensor) -> Tensor:
    """x W^T + b in fp8: [N, D], [F, D], [F] -> bfloat16 [N, F].

    A GPU uses its fp8 tensor cores. A CPU emulates them in fp32 with the same rounded operands.
    """
    tokens, bias = quantize_rows(x), b.to(torch.bfloat16)
    if not x.is_cuda:
        wide, W_wide = (q.rows.float() * q.scale[:, None] for q in (tokens, W))
        return torch.addmm(bias.float(), wide, W_wide.t()).to(torch.bfloat16)
    return torch.ops.aten._scaled_mm(
        tokens.rows,
        W.rows.t(),
        scale_a=tokens.scale[:, None],
        scale_b=W.scale[None],
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,  # its error is far below that of the operands
    )


def why_not_float8(F: int, D: int, device: torch.device | str) -> str | None:
    """Why a device cannot run the fp8 GEMM with F latents of width D; None if it can."""
    if torch.device(device).type != "cuda":
        return "fp8 needs a GPU"
    found = torch.cuda.get_device_capability(device)
    if found < FIRST_CAPABILITY:
        return f"fp8 needs a GPU of capability 8.9 or above, this one has {found[0]}.{found[1]}"
    if F % ALIGNMENT or D % ALIGNMENT:
        return f"fp8 needs d_in and d_sae to be multiples of {ALIGNMENT}, got {D} and {F}"
    return None


def float8_pays(F: int, k: int) -> bool:
    """Whether fp8 candidates are worth it: the faster GEMM against ranking candidates again.

    The GEMM takes 2 F D FLOPs per token, and reading 2 k candidates 4 k D bytes. With an H200's 780
    TFLOP/s in bfloat16, 1200 in fp8 and 4.3 TB/s they balance at F / k = 1040; the margin up to
    1500 is for quantizing the tokens and writing the rows. Above MAX_K candidates, the top-k kernel
    does not apply.
    """
    return F // k >= 1500 and 2 * k <= MAX_K
