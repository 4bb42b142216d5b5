"""The choices that a config leaves open, made for the data and the machine at hand."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from fastsae.device import choose_device
from fastsae.losses import default_k_aux

from .config import TrainConfig
from .optim import default_lr


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will do where its config says None or auto; the fields mean what they do there."""

    steps: int
    device: Literal["cpu", "cuda"]
    step: Literal["fused", "autograd"]
    encoder_precision: Literal["fp32", "tf32", "bf16"]
    lr: float
    warmup: int
    dead_after: int
    dead_every: int
    """Steps between updates of the set of dead latents: a hundredth of dead_after."""
    k_aux: int

    @classmethod
    def of(cls, config: TrainConfig, d_out: int, n_tokens: int) -> "Plan":
        """Raises ValueError for a choice that the SAE or the machine does not allow."""
        for name in ("tensorboard", "wandb"):
            if getattr(config, name) and find_spec(name) is None:
                raise ValueError(f"{name} is not installed: pip install 'fastsae[log]'")
        optimizer = config.optimizer
        steps = config.steps or max(600, n_tokens // config.batch_size)
        step = config.step
        if step == "auto":
            step = "autograd" if config.unfused else "fused"
        device = choose_device(config.device)
        if config.cuda_graph == "on" and device == "cpu":
            raise ValueError('cuda_graph "on" needs a GPU, got device cpu')
        precision = config.encoder_precision
        if precision == "auto":
            precision = "bf16" if device == "cuda" and step == "fused" else "fp32"
        if precision == "tf32" and device == "cpu":
            raise ValueError("encoder_precision tf32 needs a GPU: a CPU knows fp32 and bf16")
        if precision == "bf16" and device == "cpu" and config.activation.name != "topk":
            raise ValueError(
                f"encoder_precision bf16 on a CPU is for topk, got {config.activation.name}"
            )
        eighth = max(steps * config.batch_size // 8, 1)
        dead_after = config.dead_after or min(10_000_000, eighth)
        return cls(
            steps=steps,
            device=device,
            step=step,
            encoder_precision=precision,
            lr=optimizer.lr or default_lr(config.d_sae, steps),
            warmup=min(1000, steps // 20) if optimizer.warmup is None else optimizer.warmup,
            dead_after=dead_after,
            dead_every=max(1, dead_after // (100 * config.batch_size)),
            k_aux=config.objective.k_aux or default_k_aux(d_out),
        )
