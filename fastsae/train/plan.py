"""Resolves what a config leaves open, from the data and the machine."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, TypedDict

from jaxtyping import Float
from torch import Tensor

from fastsae.device import choose_device
from fastsae.memory import available_memory
from fastsae.nn import SAE, TopKConfig
from fastsae_kernels import WIDEST, balance, float8_pays, has_bf16, why_not_float8, why_not_int8
from fastsae_kernels.float8 import ALIGNMENT

from .config import TrainConfig
from .optim import Adam, default_lr

Resolved = Literal["fp32", "tf32", "bf16", "fp8", "int8"]
"""An encoder_precision that is not auto."""

BOTH = "W_enc", "W_dec"
MAX_PASSES = 1000
"""Passes over the data in one batch. A batch larger than the data repeats rows, so that the default
size works with little data. With far more passes, drawing a batch takes longer than training on it.
"""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The resolved settings of a run; fields have their meaning in TrainConfig."""

    steps: int
    device: str
    step: Literal["fused", "autograd"]
    encoder_precision: Resolved
    lr: float
    warmup: int
    dead_after: int
    dead_every: int
    """Steps between updates of the set of dead latents: a hundredth of dead_after."""

    @classmethod
    def of(cls, config: TrainConfig, d_out: int, n_tokens: int | None, latent: int = 1) -> "Plan":
        """Raises ValueError for a setting that the SAE or the machine does not support. `latent`
        processes divide the latents."""
        for name in ("tensorboard", "wandb"):
            if getattr(config, name) and find_spec(name) is None:
                raise ValueError(f"{name} is not installed: pip install 'fastsae-triton[log]'")
        optimizer = config.optimizer
        if config.steps is None and n_tokens is None:
            raise ValueError("steps must be given: the length of the stream is unknown")
        steps = config.steps or max(600, (n_tokens or 0) // config.batch_size)
        step = "autograd" if config.not_fused else "fused"
        device = choose_device(config.device)
        if config.cuda_graph == "on" and device == "cpu":
            raise ValueError('cuda_graph "on" needs a GPU, got device cpu')
        if config.cuda_graph == "on" and d_out > WIDEST:
            # Above it, Adam takes its torch path, which synchronizes to choose rows.
            raise ValueError(f'cuda_graph "on" needs a width of at most {WIDEST}, got {d_out}')
        precision = encoder_precision(config, step, device, d_out, config.d_sae // latent)
        eighth = max(steps * config.batch_size // 8, 1)
        dead_after = config.dead_after or min(10_000_000, eighth)
        return cls(
            steps=steps,
            device=device,
            step=step,
            encoder_precision=precision,
            lr=optimizer.lr or default_lr(config.d_sae, steps, config.batch_size),
            warmup=min(1000, steps // 20) if optimizer.warmup is None else optimizer.warmup,
            dead_after=dead_after,
            dead_every=max(1, dead_after // (100 * config.batch_size)),
        )


def adam_of(sae: SAE, config: TrainConfig, plan: Plan, sample: Float[Tensor, "N d_in"]) -> Adam:
    """Adam, with the copies of weights in less precision that the plan asks for; those in int8 are
    fit for activations like the sample."""
    copies, columns = copies_of(plan.encoder_precision), None
    if copies["quantized"] == "int8":
        tokens = sae.tokens(sample)
        columns = balance(tokens - tokens.median(0).values)  # no massive token moves it
    return Adam(sae, config.optimizer, **copies, columns=columns, seed=config.seed)


def check_batch(batch_size: int, n_tokens: int | None, width: int) -> None:
    """ValueError for a batch that takes too many passes over data of this many tokens and this
    width, or more memory than there is."""
    if n_tokens is not None and batch_size > MAX_PASSES * n_tokens:
        raise ValueError(
            f"batch_size must be at most {MAX_PASSES} times the {n_tokens} tokens of the data, "
            f"got {batch_size}"
        )
    available = available_memory()
    if 4 * batch_size * width > available:
        raise ValueError(
            f"batch_size must be at most {available // (4 * width)}, which fills the available "
            f"memory with activations of width {width}, got {batch_size}"
        )


def encoder_precision(
    config: TrainConfig, step: str, device: str, d_in: int, latents: int
) -> Resolved:
    """The config's precision, or the fastest on this device for as many latents; ValueError if
    unsupported."""
    precision, activation = config.encoder_precision, config.activation
    k = activation.k if isinstance(activation, TopKConfig) else None
    no_float8, no_int8 = why_not_float8(latents, d_in, device), why_not_int8(device)
    if precision == "auto" and (device == "cpu" or step != "fused"):
        return "fp32"
    if precision == "auto":
        pays = k is not None and float8_pays(latents, k)
        return "fp8" if pays and no_float8 is None else "bf16"
    known = ["fp32", *["bf16"] * has_bf16(), *["int8"] * (no_int8 is None)]
    others = f"this CPU knows {', '.join(known)}" if device == "cpu" else "take bf16, tf32 or fp32"
    if precision == "tf32" and device == "cpu":
        raise ValueError(f"encoder_precision tf32 needs a GPU: {others}")
    if precision == "bf16" and device == "cpu":
        if not has_bf16():
            raise ValueError(
                f"encoder_precision bf16 needs a processor with bfloat16 instructions: {others}"
            )
        precision = "fp32"  # uses these instructions where they are faster
    refusal = {"fp8": no_float8, "int8": no_int8}.get(precision)
    if refusal is not None:
        raise ValueError(f"encoder_precision {refusal}: {others}")
    if k is None and precision in ("fp8", "int8"):
        where, others = (" on a CPU", "take fp32") if device == "cpu" else ("", others)
        raise ValueError(
            f"encoder_precision {precision}{where} is for topk, got {activation.name}: {others}"
        )
    return precision


def precision_on(config: TrainConfig, d_in: int, latents: int, *, fp8: bool) -> Resolved:
    """What `encoder_precision` resolves to on a GPU that is not here, with or without fp8;
    ValueError if it is not for such a GPU."""
    precision, activation = config.encoder_precision, config.activation
    k = activation.k if isinstance(activation, TopKConfig) else None
    if precision == "int8":
        raise ValueError("encoder_precision int8 is for CPUs: take bf16, tf32 or fp32")
    if precision == "fp8" and not (fp8 and k is not None):
        raise ValueError("encoder_precision fp8 is for topk on a GPU with fp8: take bf16 or fp32")
    if precision != "auto":
        return precision
    if config.not_fused:
        return "fp32"
    whole = not (latents % ALIGNMENT or d_in % ALIGNMENT)
    return "fp8" if fp8 and whole and k is not None and float8_pays(latents, k) else "bf16"


class Copies(TypedDict):
    """Low-precision copies of the weights that Adam maintains."""

    shadows: tuple[str, ...]
    quantized: Literal["fp8", "int8"] | None


def copies_of(precision: Resolved) -> Copies:
    """bf16 and fp8 need both weights in bfloat16."""
    quantized = precision if precision == "fp8" or precision == "int8" else None
    return Copies(shadows=BOTH if precision in ("bf16", "fp8") else (), quantized=quantized)
