"""The product of an encoder with tokens, by the library that is fastest on the processor.

    product(x, W, b)    x W^T + b: [N, D], [F, D], [F] -> [N, F]

On a GPU it is cuBLAS's. On a CPU, torch has MKL's and oneDNN's, and which is faster, over how many
tokens at a time, depends on the processor: `CPU_PRODUCTS` says so, from `python -m bench step`.
Nothing is timed at run time, so that a machine gives the same bits every time.
FASTSAE_CPU_PRODUCT=mkl:1024 (or onednn:256) takes the place of the table.
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
    """How a CPU multiplies."""

    library: str
    """mkl or onednn."""
    tokens: int
    """Minimum chunk size, unless there are fewer tokens or FASTSAE_BUFFER_MB has no room."""


MAKERS = "AMD", "Intel"
INSTRUCTIONS = "amx_tile", "avx512_f", "avx2"

CPU_PRODUCTS: dict[tuple[str, str], CpuProduct] = {
    ("AMD", "avx512_f"): CpuProduct("onednn", 256),
    ("Intel", "amx_tile"): CpuProduct("onednn", 256),
    ("Intel", "avx512_f"): CpuProduct("mkl", 1024),
}
"""By the maker and the first of INSTRUCTIONS that the processor has."""

OTHERWISE = CpuProduct("onednn", 256)


@cache
def instructions() -> frozenset[str]:
    """Names of the instruction sets that the processor has, and its maker's; none if unknown."""
    found = getattr(torch.cpu, "get_capabilities", dict)()
    makers = {name for name in MAKERS if name in str(found.get("cpu_name"))}
    return frozenset(name for name, has in found.items() if has is True) | makers


def processor() -> tuple[str, str]:
    """The key of this machine in the table."""
    has = instructions()
    return (
        next((name for name in MAKERS if name in has), "other"),
        next((name for name in INSTRUCTIONS if name in has), "other"),
    )


@cache
def cpu_product() -> CpuProduct:
    """The choice for this machine; ValueError for a wrong FASTSAE_CPU_PRODUCT."""
    chosen = CPU_PRODUCTS.get(processor(), OTHERWISE)
    if words := CPU_PRODUCT:
        library, _, tokens = words.partition(":")
        if library not in LIBRARIES or not tokens.isdecimal() or int(tokens) < 1:
            raise ValueError(
                f"FASTSAE_CPU_PRODUCT must be mkl or onednn, a colon and a number of tokens, "
                f"got {words!r}"
            )
        chosen = CpuProduct(library, int(tokens))
    return chosen if torch.backends.mkldnn.is_available() else chosen._replace(library="mkl")


def has_bf16() -> bool:
    """Whether the CPU multiplies in bfloat16; without such instructions, oneDNN emulates them."""
    return bool(instructions() & {"avx512_bf16", "amx_bf16", "bf16"})


def tokens_at_a_time(x: Tensor, F: int) -> int:
    """How many tokens' products with F latents to make at a time, out of as many as x has."""
    return rows_at_a_time(x, F, cpu_product().tokens)


def product(x: Tensor, W: Tensor, b: Tensor, library: str | None = None) -> Tensor:
    """Contiguous [N, D], [F, D], [F], of one dtype -> [N, F]; a library for another choice in fp32.

    oneDNN's is the operator that torch.compile calls, and adds the bias on the way; `linear` takes
    MKL's, which adds it in a pass of its own.
    """
    if x.device.type == "cpu" and torch.backends.mkldnn.is_available():
        low = x.dtype == torch.bfloat16 and has_bf16()
        if low or (x.dtype == torch.float32 and (library or cpu_product().library) == "onednn"):
            return torch.ops.mkldnn._linear_pointwise(x, W, b, "none", [], "")
    return linear(x, W, b)
