"""The encoder GEMM, by the library that is fastest on this machine.

    product(x, W, b)    x W^T + b: [N, D], [F, D], [F] -> [N, F]

On a GPU this is cuBLAS. On a CPU, torch has MKL and oneDNN; the faster library and the best chunk
size depend on the processor. `CPU_PRODUCTS` lists them, as measured by `python -m bench step`.
Nothing is timed at run time, so a machine gives the same bits every time.
FASTSAE_CPU_PRODUCT=mkl:1024 (or onednn:256) overrides the table.
Shapes: N tokens, F latents, D model width.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from ._launch import CPU_PRODUCT, rows_at_a_time

LIBRARIES = "mkl", "onednn"


class CpuProduct(NamedTuple):
    """A library and a chunk size for the encoder GEMM on a CPU."""

    library: str
    """mkl or onednn."""
    tokens: int
    """Minimum chunk size, unless there are fewer tokens or FASTSAE_BUFFER_MB has no room."""


MAKERS = "AMD", "Intel"
INSTRUCTIONS = "avx512_f", "avx2"

CPU_PRODUCTS: dict[tuple[str, str], CpuProduct] = {
    ("AMD", "avx512_f"): CpuProduct("onednn", 256),
    ("Intel", "avx512_f"): CpuProduct("mkl", 1024),
}
"""By vendor and the first of INSTRUCTIONS that the processor supports."""

DEFAULT_PRODUCT = CpuProduct("onednn", 256)


@cache
def instructions() -> frozenset[str]:
    """The processor's instruction sets and its vendor, by name; empty if unknown."""
    found = getattr(torch.cpu, "get_capabilities", dict)()
    makers = {name for name in MAKERS if name in str(found.get("cpu_name"))}
    return frozenset(name for name, has in found.items() if has is True) | makers


def processor() -> tuple[str, str]:
    """This machine's key in CPU_PRODUCTS."""
    has = instructions()
    return (
        next((name for name in MAKERS if name in has), "other"),
        next((name for name in INSTRUCTIONS if name in has), "other"),
    )


@cache
def cpu_product() -> CpuProduct:
    """The choice for this machine. Raises ValueError for an invalid FASTSAE_CPU_PRODUCT."""
    chosen = CPU_PRODUCTS.get(processor(), DEFAULT_PRODUCT)
    if CPU_PRODUCT:
        library, _, tokens = CPU_PRODUCT.partition(":")
        if library not in LIBRARIES or not tokens.isdecimal() or int(tokens) < 1:
            raise ValueError(
                f"FASTSAE_CPU_PRODUCT must be mkl or onednn, a colon and a number of tokens, "
                f"got {CPU_PRODUCT!r}"
            )
        chosen = CpuProduct(library, int(tokens))
    return chosen if torch.backends.mkldnn.is_available() else chosen._replace(library="mkl")


def has_bf16() -> bool:
    """Whether the CPU has bfloat16 instructions; without them, oneDNN emulates them."""
    return bool(instructions() & {"avx512_bf16", "amx_bf16", "bf16"})


def tokens_at_a_time(x: Tensor, F: int) -> int:
    """Chunk size for the encoder GEMM of tokens x with F latents."""
    return rows_at_a_time(x, F, cpu_product().tokens)


def product(x: Tensor, W: Tensor, b: Tensor, library: str | None = None) -> Tensor:
    """x W^T + b: contiguous [N, D], [F, D], [F], of one dtype -> [N, F].

    `library` overrides the choice of cpu_product for fp32. For oneDNN this calls the operator that
    torch.compile uses, which fuses the bias; `linear` calls MKL, which adds it in a separate pass.
    """
    if x.device.type == "cpu" and torch.backends.mkldnn.is_available():
        low = x.dtype == torch.bfloat16 and has_bf16()
        if low or (x.dtype == torch.float32 and (library or cpu_product().library) == "onednn"):
            return torch.ops.mkldnn._linear_pointwise(x, W, b, "none", [], "")
    return linear(x, W, b)
