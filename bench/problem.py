"""Shapes that all benchmarks share, and random inputs like those of a training run."""

from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastsae_kernels._launch import rows_at_a_time

Size = tuple[int, int, int, int]
"""tokens, d_in, d_sae, k"""

SHAPES: dict[str, Size] = {"a": (4096, 384, 4096, 32), "b": (4096, 768, 12288, 32)}
SHAPES |= {"c": (4096, 768, 24576, 32), "d": (2048, 1024, 65536, 64)}
SHAPES |= {"A": (8192, 4096, 131072, 64), "B": (8192, 2048, 32768, 32)}
SHAPES |= {"C": (16384, 768, 24576, 32), "D": (4096, 4096, 1048576, 128)}
"""Lowercase shapes are for CPUs, uppercase ones for GPUs."""

TINY: dict[str, Size] = {"A": (6, 33, 20, 4), "B": (3, 16, 8, 2), "C": (5, 20, 14, 2)}
TINY["D"] = 4, 17, 18, 4
"""Replace the GPU shapes in a dry run."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Spread = Literal["uniform", "zipf", "hot"]
"""How often latents fire: equally often, by Zipf's law (the q-th latent as 1 / q), or equally often
except for one latent that fires on every token."""


def parse_shape(text: str) -> Size:
    """Parse a letter or tokens,d_in,d_sae,k. Raises ValueError for anything else."""
    if text in SHAPES:
        return SHAPES[text]
    try:
        N, D, F, K = map(int, text.split(","))
    except ValueError:
        N = D = F = K = 0
    if min(N, D, F, K) < 1 or K > F:
        letters = ", ".join(SHAPES)
        raise ValueError(f"shape must be one of {letters}, or tokens,d_in,d_sae,k; got {text!r}")
    return N, D, F, K


class Problem(NamedTuple):
    """A shape, a device and a dtype, from which ops build random arguments."""

    name: str
    N: int
    D: int
    F: int
    K: int
    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    spread: Spread = "zipf"
    dry: bool = False
    """Whether this is a dry run, which calls everything once."""

    def normal(self, *size: int, dtype: torch.dtype | None = None, std: float = 1.0) -> Tensor:
        return torch.empty(size, dtype=dtype or self.dtype, device=self.device).normal_(std=std)

    def weights(self, dtype: torch.dtype | None = None) -> Tensor:
        """[F, D] with rows of norm 1."""
        W = self.normal(self.F, self.D, dtype=dtype)
        return W.div_(torch.linalg.vector_norm(W, dim=1, keepdim=True))

    def indices(self) -> Tensor:
        """[N, K] latents, distinct within a token: one out of each of K disjoint classes."""
        members = self.F // self.K
        u = torch.rand(self.N, self.K, device=self.device)
        q = (members + 1) ** u - 1 if self.spread == "zipf" else members * u
        if self.spread == "hot":
            q[:, 0] = 0
        q = q.long().clamp_(max=members - 1)
        latent = q * self.K + torch.arange(self.K, device=self.device)
        return torch.randperm(self.F, device=self.device)[latent]

    def codes(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """values [N, K], indices [N, K]"""
        values = torch.rand(self.N, self.K, device=self.device) + 0.5
        return values.to(dtype or self.dtype), self.indices()

    def chunk(self) -> int:
        """Tokens per chunk: how many tokens' pre-activations fit in the buffer."""
        x = torch.empty(self.N, 0, dtype=self.dtype, device=self.device)
        return rows_at_a_time(x, self.F)


def precision(p: Problem) -> str:
    return next(name for name, dtype in DTYPES.items() if dtype == p.dtype)


def check_names(kind: str, given: Iterable[str] | None, allowed: Iterable[str]) -> None:
    """Raise ValueError for names that are not allowed."""
    if unknown := set(given or ()) - {*allowed}:
        names = "; ".join(sorted(unknown))
        raise ValueError(f"unknown {kind}: {names} (allowed: {'; '.join(allowed)})")
