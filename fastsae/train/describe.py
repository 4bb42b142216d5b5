"""What a run says of itself when it starts, in two lines."""

from dataclasses import fields
from typing import TYPE_CHECKING

from fastsae.data import Stream
from fastsae.nn import SAE, ActivationConfig
from fastsae.shards import Shards

if TYPE_CHECKING:
    from .trainer import Trainer


def describe(trainer: "Trainer", sae: SAE) -> str:
    """The run, in one line."""
    config, plan = trainer.config, trainer.plan
    return (
        f"{described(config.activation)}, {config.d_sae} latents of width "
        f"{sae.d_in}, {plan.steps} steps of {config.batch_size} tokens on {plan.device}"
        f"{in_processes(trainer.shards)}, "
        f"{plan.step} step{' as a CUDA graph' * trainer.captures}, "
        f"{plan.encoder_precision} encoder"
    )


def described(activation: ActivationConfig) -> str:
    """Its name, with k and the settings that are not the defaults."""
    own = ", ".join(
        f"{field.name} = {value}"
        for field in fields(activation)
        if (value := getattr(activation, field.name)) not in (field.default, None)
        or (field.name == "k" and value)
    )
    return f"{activation.name} ({own or 'defaults'})"


def in_processes(shards: Shards) -> str:
    if shards.size == 1:
        return ""
    return f" in {shards.size} processes (data={shards.data}, latent={shards.latent})"


def describe_data(trainer: "Trainer") -> str:
    """What the activations are like, in one line."""
    gamma = ", ".join(f"{part.gamma:.3g}" for part in trainer.ordinary)
    text = f"activations: |mean| / |std| = {gamma}"
    if trainer.left_out:
        ratio = trainer.config.max_norm_ratio
        text += f"; {trainer.left_out:.2%} of tokens left out, over {ratio} times the median norm"
    source = trainer.source
    return f"{text}; {source.describe()}" if isinstance(source, Stream) else text
