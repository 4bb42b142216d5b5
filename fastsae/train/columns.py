"""Which columns of the data are an SAE's inputs and which are its targets, and their scales.

An autoencoder has one source; a transcoder two, its inputs and its targets, side by side; a
crosscoder one for each layer. Each source is scaled to a mean square of 1 for training, except
inputs that the SAE itself normalizes, and the saved SAE takes and returns activations as they are.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fastsae.data import ActivationSource, Joined
from fastsae.nn import SAE

from .config import TrainConfig


@dataclass(frozen=True)
class Columns:
    """The sources of a run, side by side, and what they are to its SAE."""

    sources: tuple[ActivationSource, ...]
    transcoder: bool
    layer_norm: bool

    @classmethod
    def of(cls, config: TrainConfig, source: ActivationSource) -> "Columns":
        """ValueError unless the source has the parts that the config speaks of."""
        sources = source.sources if isinstance(source, Joined) else (source,)
        wanted = 2 if config.target is not None else 1 + len(config.layers)
        if len(sources) != wanted:
            raise ValueError(
                f"the config is for activations of {wanted} modules, the data has {len(sources)}"
            )
        widths = [part.d_in for part in sources]
        if config.layers and len(set(widths)) > 1:
            raise ValueError(f"a crosscoder's layers must have one width, got {widths}")
        return cls(sources, config.target is not None, config.layer_norm)

    @property
    def width_in(self) -> int:
        """Of the SAE's input."""
        return self.sources[0].d_in if self.transcoder else sum(s.d_in for s in self.sources)

    @property
    def width_out(self) -> int:
        """Of the SAE's output."""
        return self.sources[1].d_in if self.transcoder else self.width_in

    def build(self, config: TrainConfig) -> SAE:
        """The SAE to be trained."""
        return config.build(self.sources[0].d_in, self.width_out if self.transcoder else None)

    def split(self, x: Float[Tensor, "N D"]) -> tuple[Tensor, Tensor | None]:
        """Rows of data as the SAE's input and, for a transcoder, its target."""
        if self.transcoder:
            return x[:, : self.width_in], x[:, self.width_in :]
        return x, None

    def scales(self) -> tuple[float, ...]:
        """What each source is multiplied by; ValueError for one that is all zeros."""
        squares = [source.mean_square for source in self.sources]
        if not all(0 < square < torch.inf for square in squares):
            raise ValueError(f"activations must have a mean square above 0, got {squares}")
        scales = tuple(square**-0.5 for square in squares)
        if not self.layer_norm:
            return scales
        return (1.0, scales[1]) if self.transcoder else (1.0,)

    def factors(
        self, scales: tuple[float, ...], device: torch.device | str = "cpu"
    ) -> Float[Tensor, " D"] | float:
        """The factor of each column of the data, or the one of all."""
        if len(scales) == 1:
            return scales[0]
        parts = zip(scales, self.sources, strict=True)
        return torch.cat([torch.full((part.d_in,), s) for s, part in parts]).to(device)

    def fold_(self, sae: SAE, scales: tuple[float, ...]) -> SAE:
        """Make an SAE that was trained on scaled data one for data as they are."""
        if self.transcoder or len(scales) == 1:
            return sae.fold_scale_(scales[0], scales[-1])
        factors = self.factors(scales)
        assert isinstance(factors, Tensor)
        return sae.fold_columns_(factors)
