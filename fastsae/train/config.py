"""What a training run is made of."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from fastsae.config import check_choices, from_dict
from fastsae.data.ordinary import MAX_NORM_RATIO, check_max_norm_ratio
from fastsae.data.stream_config import StreamConfig
from fastsae.device import check_device
from fastsae.losses import Objective
from fastsae.nn import SAE, ActivationConfig, Init, TopKConfig

from .conflicts import CONFLICTS, NEEDS_AUTOGRAD, NOT_CAPTURED, STEP_CONFLICTS, check, first
from .optim import Optimizer

Precision = Literal["auto", "fp32", "tf32", "bf16", "fp8", "int8"]
Downstream = Literal["none", "kl", "ce"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a run; the defaults train on the demo activations in a few minutes."""

    data: Path | None = None
    """Activations to train on: a directory from `fastsae harvest`, .npy or .safetensors files,
    or a .pt file. Default: harvest demo activations (MiniLM over the Python standard library)."""

    target: Path | None = None
    """Target activations for the same tokens, with --model their hookpoint (trains a
    transcoder)."""

    skip: bool = False
    """Add a linear skip connection to the transcoder."""

    layers: tuple[Path, ...] = ()
    """Activations of the same tokens at further layers, with --model their hookpoints, encoded
    jointly with the first ones (trains a crosscoder)."""

    out: Path = Path("runs/sae")
    """Run directory for results; it must not hold another run."""

    d_sae: int = 4096
    """Number of latents."""

    by_norm: bool = False
    """Select and penalize latents by activation times decoder-row norm; needs a constraint other
    than unit. Crosscoders always do, with the norms over all layers."""

    layer_norm: bool = False
    """Apply layer norm to each input token. Autoencoders and crosscoders are trained to reconstruct
    the normalized activations, transcoders to predict `target` as it is. The saved SAE takes and
    returns raw activations."""

    max_norm_ratio: float | None = MAX_NORM_RATIO
    """Leave out tokens that are further from the mean than this multiple of the median distance,
    such as attention sinks, in training (but not inputs with layer norm) and evaluation; none keeps
    all."""

    activation: ActivationConfig = field(default_factory=TopKConfig)
    """Activation."""

    objective: Objective = field(default_factory=Objective)
    """Loss."""

    downstream: Downstream = "none"
    """With --model: also train on the model's next-token predictions with the reconstruction in
    place of the activations: on their KL divergence from the original predictions (kl), or on their
    cross-entropy (ce), averaged over tokens, in nats. The model must be a causal language model."""

    downstream_coef: float = 1.0
    """Coefficient of the downstream term; 0 only measures it. At 1, a nat per token counts as much
    as a factor of e in FVU, if the error is log_fvu."""

    downstream_windows: int = 8
    """Contexts that a step runs through the model for the downstream term."""

    optimizer: Optimizer = field(default_factory=Optimizer)
    """Optimizer."""

    init: Init = field(default_factory=Init)
    """Initialization."""

    stream: StreamConfig | None = None
    """Activations straight from a model, instead of data."""

    steps: int | None = None
    """Training steps (default: one pass over the data, at least 600; required with --model)."""

    batch_size: int = 4096
    """Tokens per step."""

    seed: int = 0
    """Random seed of initialization and shuffling; runs with the same seed are bit-identical."""

    data_seed: int | None = None
    """Seed for data shuffling (default: `seed`)."""

    device: str = "auto"
    """Training device: auto (a GPU if available), cpu, cuda, or cuda:N."""

    encoder_precision: Precision = "auto"
    """Precision of the encoder GEMM. On a GPU, the fused step works on bf16 copies of the fp32
    weights with bf16 and fp8: bf16 ranks latents by bf16 pre-activations; fp8 (TopK, compute
    capability 8.9 or higher, sizes divisible by 16) finds candidates in fp8 and ranks them in fp32.
    auto is fp8 where supported if d_sae >= 1500 k and k <= 512, else bf16; on a CPU or without the
    fused step it is fp32. tf32 uses TF32 for all dense matmuls. On a CPU, bf16 is the same as fp32,
    which uses bf16 instructions where it can prove that this changes no active latent. int8 (TopK,
    VNNI instructions) finds candidates and ranks them in fp32: almost always the same latents."""

    dead_after: int | None = None
    """Tokens without activation after which a latent counts as dead (default: 10 million, or an
    eighth of the run if that is less)."""

    step: Literal["auto", "fused", "autograd"] = "auto"
    """Implementation of the training step; auto uses the fused step where supported."""

    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """Replay the fused step as a CUDA graph while no latent is dead; auto does so for TopK and
    AbsTopK, whose L0 is fixed."""

    checkpoint_every: int = 200
    """Steps between checkpoints."""

    keep_checkpoints: int = 2
    """Number of checkpoints to keep."""

    log_every: int = 10
    """Steps between log lines (metrics.jsonl)."""

    eval_every: int | None = None
    """Steps between evaluations on up to 16,384 held-out tokens, logged as heldout_fvu, heldout_l0
    and heldout_dead_fraction (default: none during training)."""

    patience: int | None = None
    """Stop early once this many evaluations in a row have not lowered the held-out FVU; needs
    eval_every."""

    tensorboard: bool = False
    """Also log to TensorBoard, in OUT/tensorboard."""

    wandb: str | None = None
    """Also log to this Weights & Biases project."""

    wandb_artifacts: bool = False
    """Also store the SAE and the report as artifacts of the W&B run."""

    def __post_init__(self):
        at_least_one = ("d_sae", "steps", "batch_size", "checkpoint_every", "keep_checkpoints")
        at_least_one += ("log_every", "dead_after", "eval_every", "patience", "downstream_windows")
        for name in at_least_one:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("seed", "data_seed"):
            if not 0 <= (getattr(self, name) or 0) < 2**63:
                raise ValueError(f"{name} must be from 0 to 2**63 - 1, got {getattr(self, name)}")
        check_choices(self, downstream=Downstream)
        if not self.downstream_coef >= 0:
            raise ValueError(f"downstream_coef must be at least 0, got {self.downstream_coef}")
        check_device(self.device)
        check_max_norm_ratio(self.max_norm_ratio)
        if self.batch_size < 2:
            raise ValueError(f"batch_size must be at least 2, got {self.batch_size}")
        check(CONFLICTS, self)
        with torch.device("meta"):
            self.build(2, None if self.target is None else 1)
        check(STEP_CONFLICTS, self)

    @property
    def hookpoints(self) -> tuple[str, ...]:
        """Whose rows a stream has side by side for this run; none for data that are stored."""
        if self.stream is None:
            return ()
        return (*self.stream.hookpoints, *map(str, filter(None, (self.target, *self.layers))))

    @property
    def needs_autograd(self) -> str | None:
        """What the fused step does not support, if anything."""
        return first(NEEDS_AUTOGRAD, self)

    @property
    def not_fused(self) -> str | None:
        """Why training takes the autograd step; None if it takes the fused step."""
        return self.needs_autograd or ('step "autograd"' if self.step == "autograd" else None)

    @property
    def not_captured(self) -> str | None:
        """Why a step cannot be a CUDA graph; None if it needs nothing but a GPU."""
        return first(NOT_CAPTURED, self)

    def build(self, d_in: int, d_out: int | None = None) -> SAE:
        """The SAE to be trained, on activations of width d_in in each layer.

        Raises ValueError for settings that do not fit each other.
        """
        layers = len(self.layers) + 1
        sae = SAE(
            layers * d_in,
            self.d_sae,
            self.activation.build(),
            d_out,
            skip=self.skip,
            layers=layers,
            by_norm=self.by_norm or layers > 1,
            layer_norm=self.layer_norm,
        )
        self.objective.check(sae)
        self.init.check(sae)
        return sae


def read_config(stored: Any, where: str) -> TrainConfig:
    """The settings of a run from its JSON, also of an older version; ValueError if damaged."""
    parts = stored if isinstance(stored, dict) else {}
    init, activation, optimizer = (parts.get(n) for n in ("init", "activation", "optimizer"))
    if isinstance(init, dict) and init.get("encoder", "") is None:  # then left to the activation
        fits = isinstance(activation, dict) and activation.get("name") in ("topk", "batchtopk")
        aligned = isinstance(optimizer, dict) and optimizer.get("constraint") == "aligned"
        fitted = fits and not aligned and parts.get("target") is None
        stored = {**parts, "init": {**init, "encoder": "fitted" if fitted else "tied"}}
    return from_dict(TrainConfig, stored, where)
