"""Which columns of the data are an SAE's inputs and which are its targets.

An autoencoder has one source; a transcoder two, its inputs and its targets, side by side; a
crosscoder one for each layer. Each source is standardized for training, except inputs that the SAE
itself normalizes, and the saved SAE takes and returns activations as they are.
"""

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from fastsae.data import ActivationSource, Joined, Stream
from fastsae.data.ordinary import SAMPLE_TOKENS, Ordinary
from fastsae.nn import SAE

from .config import TrainConfig
from .standardization import Standardization


@dataclass(frozen=True)
class Columns:
    """The sources of a run, side by side, and what they are to its SAE."""

    source: ActivationSource
    widths: tuple[int, ...]
    transcoder: bool
    layer_norm: bool

    @classmethod
    def of(cls, config: TrainConfig, source: ActivationSource) -> "Columns":
        """ValueError unless the source has the parts that the config speaks of."""
        widths = source.widths if isinstance(source, Joined | Stream) else (source.d_in,)
        wanted = 2 if config.target is not None else 1 + len(config.layers)
        if len(widths) != wanted:
            raise ValueError(
                f"the config is for activations of {wanted} modules, the data has {len(widths)}"
            )
        if config.layers and len(set(widths)) > 1:
            raise ValueError(f"a crosscoder's layers must have one width, got {[*widths]}")
        return cls(source, widths, config.target is not None, config.layer_norm)

    @property
    def width_in(self) -> int:
        """Of the SAE's input."""
        return self.widths[0] if self.transcoder else sum(self.widths)

    @property
    def width_out(self) -> int:
        """Of the SAE's output."""
        return self.widths[1] if self.transcoder else self.width_in

    def build(self, config: TrainConfig) -> SAE:
        """The SAE to be trained."""
        return config.build(self.widths[0], self.width_out if self.transcoder else None)

    def split(self, x: Float[Tensor, "*N D"]) -> tuple[Tensor, Tensor | None]:
        """Rows of data as the SAE's input and, for a transcoder, its target."""
        if self.transcoder:
            return x[..., : self.width_in], x[..., self.width_in :]
        return x, None

    def ordinary(self, max_norm_ratio: float | None) -> list[Ordinary]:
        """The ordinary tokens of each source; ValueError if the tokens of a sample are equal."""
        samples = self.source.sample(SAMPLE_TOKENS).split(self.widths, dim=1)
        for number, sample in enumerate(samples):
            if not (sample != sample[0]).any():
                name = "targets" if self.transcoder and number else "activations"
                raise ValueError(f"all sampled {name} are identical")
        found = [Ordinary.of(sample, max_norm_ratio) for sample in samples]
        for part in found:
            if not 1e-15 < part.spread < 1e15:  # squares must be float32 numbers
                raise ValueError(
                    f"activations must have a spread from 1e-15 to 1e15, got {part.spread:.3g}"
                )
        return found

    def standardization(self, sources: list[Ordinary]) -> Standardization:
        """What is done to the data before training: nothing to inputs that the SAE normalizes."""
        units = Standardization.of(sources)
        if self.layer_norm:
            n = 1 if self.transcoder else len(sources)
            units.mean[: self.width_in] = 0
            units.scales = (1.0,) * n + units.scales[n:]
            units.limits = (math.inf,) * n + units.limits[n:]
        return units

    def fold_(self, sae: SAE, units: Standardization) -> SAE:
        """Make an SAE that was trained on standardized data one for data as they are."""
        return self._fold_mean_(self._fold_scales_(sae, units.factors), units.mean)

    def unfold_(self, sae: SAE, units: Standardization) -> SAE:
        """Make an SAE for data as they are one for standardized data."""
        return self._fold_scales_(self._fold_mean_(sae, -units.mean), 1 / units.factors)

    def _fold_scales_(self, sae: SAE, factors: Float[Tensor, " D"]) -> SAE:
        if self.transcoder or len(self.widths) == 1 or self.layer_norm:
            return sae.fold_scale_(float(factors[0]), float(factors[-1]))
        return sae.fold_columns_(factors)

    def _fold_mean_(self, sae: SAE, mean: Float[Tensor, " D"]) -> SAE:
        return sae.fold_mean_(*self.split(mean))
