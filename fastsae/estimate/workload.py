"""What is trained, as far as memory and time depend on it."""

from dataclasses import dataclass, field
from typing import Literal

from fastsae.distributed import Axes

Precision = Literal["fp32", "tf32", "bf16", "fp8", "int8"]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A run's shapes, and the settings that its memory and time depend on."""

    tokens: int
    """Tokens of a step, of all processes."""
    d_in: int
    """Width of the SAE's input."""
    d_out: int
    """Width of its output."""
    row_width: int
    """Width of a row of data: both for a transcoder."""
    latents: int
    active: int
    """Active latents per token."""
    steps: int
    evaluated: int
    """Tokens that are evaluated at a time at the end of the run."""
    gpu: bool = False
    """Whether it trains on a GPU."""
    fused: bool = True
    """Whether it takes the fused step."""
    precision: Precision = "fp32"
    """Of the encoder GEMM."""
    bf16_candidates: bool = False
    """Whether a CPU finds the k largest pre-activations with bfloat16 instructions."""
    low_moments: bool = False
    """Whether Adam's moments are in bf16."""
    row_second: bool = False
    """Whether the second moment is one number per row."""
    window: int = 1
    """Steps that a row without gradient waits at most."""
    ema: bool = False
    """Whether an average of the weights is kept."""
    auxk: bool = False
    """Whether there may be dead latents, which the aux-k loss revives."""
    checkpoints: int = 2
    """Checkpoints that are kept."""
    loaded: int = 0
    """Bytes of stored data that are in memory at a time, to draw batches from."""
    streamed: bool = False
    """Whether a model produces the activations, whose own time and memory are not counted."""
    axes: Axes = field(default_factory=Axes)

    @property
    def own_latents(self) -> int:
        """Latents of one process."""
        return -(-self.latents // self.axes.latent)

    @property
    def low_encoder(self) -> bool:
        """Whether the encoder GEMM is in bf16 or fp8."""
        return self.precision in ("bf16", "fp8")

    @property
    def entries(self) -> int:
        """Entries of both weights on one process."""
        return self.own_latents * (self.d_in + self.d_out)
