"""Activations as training sees them: centered, scaled, without tokens of extreme norm."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fastsae.data.ordinary import Ordinary


@dataclass
class Standardization:
    """x becomes (x - mean) * scale, so that the ordinary tokens of each source of columns have a
    mean of 0 and a mean square of 1."""

    mean: Float[Tensor, " D"]
    scales: tuple[float, ...]
    """One for each source."""
    limits: tuple[float, ...]
    """The largest norm of an ordinary token in each source, standardized."""
    widths: tuple[int, ...]
    _on_gpu: tuple[Tensor, Tensor] | None = field(default=None, init=False, repr=False)

    @classmethod
    def of(cls, sources: Sequence[Ordinary]) -> "Standardization":
        widths = tuple(len(source.mean) for source in sources)
        pairs = zip(widths, sources, strict=True)
        scales = tuple(width**0.5 / source.spread for width, source in pairs)
        limits = tuple(o.limit * scale for o, scale in zip(sources, scales, strict=True))
        return cls(torch.cat([source.mean for source in sources]), scales, limits, widths)

    @property
    def factors(self) -> Float[Tensor, " D"]:
        """The scale of each column."""
        return torch.tensor(self.scales).repeat_interleave(torch.tensor(self.widths))

    def __call__(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """Standardize activations in place."""
        mean, factors = self._on(x.device)
        return x.sub_(mean).mul_(factors)

    def undo(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """The activations that became x."""
        mean, factors = self._on(x.device)
        return x / factors + mean

    def _on(self, device: torch.device) -> tuple[Float[Tensor, " D"], Float[Tensor, " D"]]:
        """Mean and factors."""
        if device.type == "cpu":
            return self.mean, self.factors
        if self._on_gpu is None:  # copied once: a copy for every batch would wait for the GPU
            self._on_gpu = self.mean.to(device), self.factors.to(device)
        return self._on_gpu

    def ordinary(self, x: Float[Tensor, "N D"]) -> Bool[Tensor, " N"]:
        """Which standardized tokens are within the limit of every source."""
        parts = zip(x.split(self.widths, dim=1), self.limits, strict=True)
        beyond = [torch.linalg.vector_norm(part, dim=1) > limit for part, limit in parts]
        return ~torch.stack(beyond).any(0)


def replace_rows(x: Float[Tensor, "N D"], kept: Bool[Tensor, " N"]) -> Float[Tensor, "N D"]:
    """x with each row that is not kept replaced by the kept one before it, or by the last one of
    all: a batch keeps its size, and no value is read back from a GPU."""
    if x.device.type == "cpu" and kept.all():
        return x
    place = torch.arange(len(x), device=x.device)
    before = place.where(kept, -1).cummax(0).values
    return x[before.where(before >= 0, before[-1])]
