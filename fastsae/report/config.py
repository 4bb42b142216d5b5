"""Settings of a report."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastsae.config import check_choices
from fastsae.data.ordinary import MAX_NORM_RATIO, check_max_norm_ratio
from fastsae.device import check_device

Projection = Literal["auto", "pca", "umap"]


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What a report shows."""

    data: Path | None = None
    """Activations to show the latents on, as for training; uses their held-out part if there is one
    (default: those the SAE was trained on)."""

    out: Path | None = None
    """HTML file to write (default: report.html in the directory of the run or SAE)."""

    neuronpedia: Path | None = None
    """New or empty directory; also writes the latents with a card there, in SAEDashboard's JSON,
    which Neuronpedia imports."""

    compare: Path | None = None
    """Directory of a second run, whose curves are drawn over those of the first."""

    latents: int = 256
    """Latents with a card, drawn from all frequencies."""

    include: tuple[int, ...] = ()
    """Numbers of latents that get a card, too."""

    max_tokens: int = 100_000
    """Tokens to show the latents on, in blocks spread evenly over the data; fewer if very many
    latents are active per token."""

    max_norm_ratio: float | None = MAX_NORM_RATIO
    """Leave out tokens that are further from the mean than this multiple of the median distance,
    such as attention sinks; none keeps all. By default as in training."""

    lens: bool = True
    """Load the model to show which next tokens a latent promotes, if it is a causal language
    model."""

    projection: Projection = "auto"
    """Map of the decoder rows: pca or umap; auto is umap if umap-learn is installed."""

    seed: int = 0
    """Seed of what is drawn at random: latents and contexts."""

    batch_size: int = 4096
    """Tokens per batch."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model."""

    device: str = "auto"
    """Device: auto (a GPU if available), cpu, cuda, or cuda:N."""

    def __post_init__(self):
        check_device(self.device)
        check_max_norm_ratio(self.max_norm_ratio)
        check_choices(self, projection=Projection)
        least = {"latents": 1, "max_tokens": 1, "batch_size": 1, "seed": 0}
        for name, minimum in least.items():
            if (value := getattr(self, name)) < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {value}")
