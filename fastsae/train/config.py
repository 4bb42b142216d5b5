"""What a training run is made of."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastsae.device import Device
from fastsae.nn import SAE, AbsTopK, TopK
from fastsae.nn.topk import Gradient, Rotation

ACTIVATIONS = {"topk": TopK, "abstopk": AbsTopK}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a run; the defaults train on the demo's activations in a few minutes."""

    data: Path | None = None
    """Activations to train on: a folder from `fastsae harvest`, or .npy or .safetensors files.
    Without it, activations of a small transformer over Python's own library are made and used."""

    out: Path = Path("runs/sae")
    """Folder for the run's results; it must not hold another run."""

    d_sae: int = 4096
    """Latents in the dictionary."""

    k: int = 32
    """Active latents per token."""

    activation: Literal["topk", "abstopk"] = "topk"
    """Which pre-activations are kept: the k largest, or the k of largest magnitude, signed."""

    gradient: Gradient = "straight_through"
    """What trains the encoder: the gradient of the kept latents, or that gradient rotated as the
    choice of them rotated the pre-activations (arXiv:2410.06424)."""

    rotation: Rotation | None = None
    """Whose gradient a rotation takes: that of the kept latents (support, the default) or of all
    latents, also those not kept (dense)."""

    steps: int | None = None
    """Optimisation steps; by default one pass over the data, but at least 600."""

    batch_size: int = 4096
    """Tokens per step."""

    lr: float | None = None
    """Peak learning rate; by default 2e-4 / sqrt(d_sae / 16384), and up to 5 times that in runs
    of under 15000 steps."""

    warmup: int | None = None
    """Steps over which the learning rate rises; by default a twentieth of all, at most 1000."""

    decay: float = 0.2
    """Last part of the run over which the learning rate falls to 0."""

    seed: int = 0
    """Seed of initialisation and shuffling: the same seed gives the same bits."""

    device: Device = "auto"
    """Where to train; auto takes a GPU if there is one."""

    encoder_precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    """Precision of the encoder's product; auto is bf16 for the fused step on a GPU, else fp32.
    tf32 lets a GPU round the inputs of all dense products. On a CPU, bf16 finds candidates for the
    active latents and ranks them in fp32: faster where the processor has bf16 instructions, and
    almost always the same choice. On a GPU, the active latents and all that follows are computed
    from bf16 copies of the fp32 weights."""

    adam_moments: Literal["fp32", "bf16"] = "fp32"
    """How Adam's moments of the weights are kept; bf16, rounded stochastically, saves a third of
    the memory and of what each step moves."""

    adam_window: int = 1
    """Latents without a gradient are updated at least every so many steps, at most 8; then they
    make up for the steps they missed, and until then the encoder sees them as they were. 1 is
    Adam."""

    dead_after: int | None = None
    """Tokens without firing after which a latent counts as dead; by default 10 million, or an
    eighth of the run if that is less."""

    auxk_coef: float = 1 / 32
    """Weight of the loss that revives dead latents; 0 turns it off."""

    k_aux: int | None = None
    """Dead latents per token that take part in it; by default d_in / 2."""

    step: Literal["auto", "fused", "autograd"] = "auto"
    """How a step is computed; auto takes the fused step wherever it applies."""

    checkpoint_every: int = 200
    """Steps between checkpoints."""

    keep_checkpoints: int = 2
    """Checkpoints that are kept: the last ones."""

    log_every: int = 10
    """Steps between lines of metrics.jsonl."""

    tensorboard: bool = False
    """Also log to TensorBoard, in OUT/tensorboard."""

    wandb: str | None = None
    """Also log to this project of Weights & Biases."""

    def __post_init__(self):
        at_least_one = ("d_sae", "k", "steps", "batch_size", "checkpoint_every", "k_aux")
        for name in (*at_least_one, "keep_checkpoints", "log_every", "dead_after"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.batch_size < 2:
            raise ValueError(f"batch_size must be at least 2, got {self.batch_size}")
        if self.k > self.d_sae:
            raise ValueError(f"k must be between 1 and d_sae = {self.d_sae}, got {self.k}")
        if self.lr is not None and not self.lr > 0:
            raise ValueError(f"lr must be above 0, got {self.lr}")
        if self.warmup is not None and self.warmup < 0:
            raise ValueError(f"warmup must be at least 0, got {self.warmup}")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay must be between 0 and 1, got {self.decay}")
        if not self.auxk_coef >= 0:
            raise ValueError(f"auxk_coef must be at least 0, got {self.auxk_coef}")
        if self.auxk_coef == 0 and self.k_aux is not None:
            raise ValueError(f"k_aux = {self.k_aux} has no effect with auxk_coef = 0")
        if not 1 <= self.adam_window <= 8:
            raise ValueError(f"adam_window must be between 1 and 8, got {self.adam_window}")
        if self.rotation is not None and self.gradient != "rotation":
            raise ValueError(
                f'rotation = {self.rotation} has no effect without gradient "rotation"'
            )
        if self.step == "fused" and self.gradient == "rotation":
            raise ValueError('gradient "rotation" needs the autograd step, got step "fused"')
        if self.step == "autograd" or self.gradient == "rotation":
            given = f'got step "{self.step}" and gradient "{self.gradient}"'
            fused = {"encoder_precision": ("bf16", "tf32"), "adam_moments": ("bf16",)}
            for name, values in fused.items():
                if (value := getattr(self, name)) in values:
                    raise ValueError(f'{name} "{value}" needs the fused step, {given}')
            if self.adam_window > 1:
                raise ValueError(f"adam_window = {self.adam_window} needs the fused step, {given}")

    def build(self, d_in: int) -> SAE:
        """The SAE to be trained, on activations of width d_in."""
        activation = ACTIVATIONS[self.activation]
        rotation = self.rotation or "support"
        return SAE(d_in, self.d_sae, activation(self.k, gradient=self.gradient, rotation=rotation))
