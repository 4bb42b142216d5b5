"""Everything there is to say of a trained SAE on some data, as one value and as a table."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastsae.data.joined import Joined
from fastsae.data.shards import ActivationShards
from fastsae.device import check_device, choose_device
from fastsae.nn.sae import SAE

from .downstream import CausalEffect, Downstream, EncoderEffect, downstream
from .reconstruction import Reconstruction, reconstruction

Row = tuple[str, str, str]  # a name, its value, what it means


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What to measure."""

    data: Path | None = None
    """Activations to evaluate on, as for training; uses their held-out part if there is one
    (default: those the SAE was trained on)."""

    max_tokens: int | None = None
    """Evaluate the reconstruction on the first N tokens (default: all)."""

    batch_size: int = 4096
    """Tokens per batch."""

    windows: int = 128
    """Text windows to run the model on with the SAE spliced in; 0 skips the downstream
    evaluation."""

    batch_windows: int = 8
    """Windows per forward pass of the model."""

    model_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the model."""

    device: str = "auto"
    """Device: auto (a GPU if available), cpu, cuda, or cuda:N."""

    def __post_init__(self):
        check_device(self.device)
        least = {"max_tokens": 1, "batch_size": 1, "windows": 0, "batch_windows": 1}
        for name, minimum in least.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {value}")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an SAE keeps of its data, and of the model the data came from."""

    data: str
    """Where the activations are."""

    reconstruction: Reconstruction
    """How it reconstructs them."""

    downstream: Downstream | None
    """What the model does with it in place; None if that was left out, or no model is known."""


def evaluate(
    sae: SAE, data: ActivationShards | Joined, config: EvalConfig, progress: bool = True
) -> Evaluation:
    """Measures an SAE on all of data, within the limits of config. `sae` is moved to its device.

    `config.data` is for those who choose data by it, as the command line does. ValueError if a GPU
    is asked for where there is none, or if the data does not fit the SAE. A transcoder or a
    crosscoder, whose data are `Joined`, is not put in place in the model.
    """
    sae = sae.to(choose_device(config.device))
    effect = None
    if config.windows and isinstance(data, ActivationShards):
        effect = downstream(
            sae,
            data,
            max_windows=config.windows,
            batch_size=config.batch_windows,
            model_dtype=config.model_dtype,
            progress=progress,
        )
    found = reconstruction(
        sae, data, max_tokens=config.max_tokens, batch_size=config.batch_size, progress=progress
    )
    parts = data.sources if isinstance(data, Joined) else (data,)
    where = " + ".join(str(getattr(part, "path", part)) for part in parts)
    return Evaluation(data=where, reconstruction=found, downstream=effect)


def evaluation_table(result: Evaluation) -> str:
    """The numbers in aligned columns: name, value, meaning."""
    rows = _reconstruction_rows(result.reconstruction)
    effect = result.downstream
    if effect is None:
        rows.append(
            (
                "model",
                "-",
                "not run: the data do not name it or are of several modules, or windows is 0",
            )
        )
    else:
        rows += _encoder_rows(effect) if isinstance(effect, EncoderEffect) else _causal_rows(effect)
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(
        f"  {name:<{widths[0]}}  {value:>{widths[1]}}  {text}" for name, value, text in rows
    )


def _reconstruction_rows(found: Reconstruction) -> list[Row]:
    retention = [
        (f"PC retention {rank}", f"{value:.4f}", f"of the {rank} leading principal components")
        for rank, value in found.pc_retention.items()
    ]
    return [
        ("tokens", f"{found.tokens:,}", "reconstructed"),
        ("FVU", f"{found.fvu:.4f}", "fraction of variance unexplained"),
        ("MSE", f"{found.mse:.4g}", "mean squared error per coordinate"),
        ("L0", f"{found.l0:.1f}", "active latents per token"),
        ("dead", f"{found.dead_fraction:.2%}", "of the latents: active for no token"),
        ("dense", f"{found.dense_fraction:.2%}", "of the latents: active for over 10 % of tokens"),
        ("utilisation", f"{found.utilisation:.2%}", "of the latents: exp(entropy) of which fire"),
        ("cosine", f"{found.cosine:.4f}", "between a token and its reconstruction"),
        ("relative norm", f"{found.relative_norm:.4f}", "of a reconstruction to its token's"),
        *retention,
    ]


def _encoder_rows(effect: EncoderEffect) -> list[Row]:
    return [
        ("windows", f"{effect.windows:,}", "of text embedded by the model with the SAE in place"),
        ("embeddings", f"{effect.cosine:.4f}", "cosine to the model's own"),
        ("  zeros", f"{effect.cosine_zero:.4f}", "the same, all activations set to zero"),
        ("  mean", f"{effect.cosine_mean:.4f}", "the same, all set to their mean"),
        *_recovered_rows(effect),
    ]


def _causal_rows(effect: CausalEffect) -> list[Row]:
    return [
        ("predicted", f"{effect.tokens:,}", "next tokens, by the model with the SAE in place"),
        ("cross-entropy", f"{effect.ce:.4f}", "nats per token"),
        ("  clean", f"{effect.ce_clean:.4f}", "the same, of the model itself"),
        ("  zeros", f"{effect.ce_zero:.4f}", "the same, all activations set to zero"),
        ("  mean", f"{effect.ce_mean:.4f}", "the same, all set to their mean"),
        ("KL", f"{effect.kl:.4f}", "from the model itself, nats per token"),
        *_recovered_rows(effect),
    ]


def _recovered_rows(effect: Downstream) -> list[Row]:
    shares = {"zeros": effect.recovered_zero, "the mean": effect.recovered_mean}
    return [
        ("recovered", "-" if share is None else f"{share:.2%}", f"of what {name} would destroy")
        for name, share in shares.items()
    ]
