"""Settings of a harvest."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastsae.config import check_choices
from fastsae.data.producer_config import ProducerConfig
from fastsae.device import check_device

SavedDtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class HarvestConfig(ProducerConfig):
    """Run a Hugging Face model over text and save activations at one or more hookpoints."""

    out: Path
    """Output directory for the shards; held-out shards go to its subdirectory `heldout`. With
    several hookpoints, each gets a subdirectory of its name."""

    max_tokens: int | None = None
    """Stop once this many training tokens have been collected."""

    dtype: SavedDtype = "auto"
    """Precision of the saved activations; auto is that of the model's own weights, as its config
    says (float32 if that is another one)."""

    device: str = "auto"
    """Device for the model: auto (a GPU if available), cpu, cuda, or cuda:N."""

    def __post_init__(self):
        super().__post_init__()
        check_device(self.device)
        check_choices(self, dtype=SavedDtype)
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")

    @property
    def folders(self) -> dict[str, Path]:
        """The folder for each hookpoint's shards."""
        several = len(self.hookpoints) > 1
        return {name: self.out / name if several else self.out for name in self.hookpoints}
