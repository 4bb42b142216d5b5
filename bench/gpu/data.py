"""The shapes of the GPU benchmark, and random inputs like those of a run."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastsae_kernels._launch import rows_at_a_time

SHAPES = {  # tokens, d_in, d_sae, k
    "A": (8192, 4096, 131072, 64),
    "B": (8192, 2048, 32768, 32),
    "C": (16384, 768, 24576, 32),
    "D": (4096, 4096, 1048576, 128),
}
TINY = {"A": (6, 40, 80, 4), "B": (5, 32, 64, 2), "C": (7, 24, 48, 2), "D": (4, 48, 70, 4)}
"""What stands for them in a rehearsal."""


class Problem(NamedTuple):
    """A shape on a device."""

    name: str
    N: int
    D: int
    F: int
    K: int
    device: torch.device

    @property
    def rehearsal(self) -> bool:
        return self.device.type == "cpu"

    def of(self, N: int | None = None, F: int | None = None) -> "Problem":
        """The same with fewer tokens or latents."""
        return self._replace(N=min(N or self.N, self.N), F=min(F or self.F, self.F))

    def normal(self, *size: int, dtype: torch.dtype = torch.float32, std: float = 1.0) -> Tensor:
        return torch.empty(size, dtype=dtype, device=self.device).normal_(std=std)

    def weights(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """[F, D] with rows of norm 1."""
        W = self.normal(self.F, self.D, dtype=dtype)
        return W.div_(torch.linalg.vector_norm(W, dim=1, keepdim=True))

    def integers(self, *size: int, dtype: torch.dtype, density: float = 1.0) -> Tensor:
        """-1, 0 or 1, and 0 again where density says so: every order of summation is exact."""
        whole = torch.randint(-1, 2, size, dtype=dtype, device=self.device)
        if density < 1:
            whole.mul_(torch.rand(size, device=self.device) < density)
        return whole

    def indices(self) -> Tensor:
        """[N, K], distinct within a token; some latents fire often, as in trained dictionaries.

        Each of K classes of latents gives one: its q-th most frequent in a share of the tokens that
        falls as 1 / q.
        """
        members = self.F // self.K
        u = torch.rand(self.N, self.K, device=self.device)
        q = ((members + 1) ** u - 1).long().clamp_(max=members - 1)
        latent = q * self.K + torch.arange(self.K, device=self.device)
        return torch.randperm(self.F, device=self.device)[latent]

    def codes(self, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
        """values [N, K], indices [N, K]"""
        values = torch.rand(self.N, self.K, device=self.device) + 0.5
        return values.to(dtype), self.indices()

    def chunk(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """Tokens whose pre-activations exist at a time."""
        x = torch.empty(self.N, 0, dtype=dtype, device=self.device)
        return rows_at_a_time(x, self.F)


def problems(names: list[str], rehearsal: bool) -> list[Problem]:
    device = torch.device("cpu" if rehearsal else "cuda")
    return [Problem(name, *(TINY if rehearsal else SHAPES)[name], device) for name in sorted(names)]
