"""All evaluations of a trained SAE on some data, as one value and as a table."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from fastsae.config import from_dict
from fastsae.data.joined import Joined
from fastsae.data.ordinary import MAX_NORM_RATIO, check_max_norm_ratio
from fastsae.data.source import StoredActivations, TextActivations
from fastsae.device import check_device, choose_device
from fastsae.files import read_json
from fastsae.nn.sae import SAE

from .downstream import CausalEffect, Downstream, EncoderEffect, downstream
from .reconstruction import Reconstruction, reconstruction
from .verdict import LIMITS, verdict

Row = tuple[str, str, str, str]
"""Name, field of the result, format and meaning."""

RECONSTRUCTION: tuple[Row, ...] = (
    ("tokens", "tokens", ",", "reconstructed"),
    ("FVU", "fvu", ".4f", "fraction of variance unexplained"),
    ("MSE", "mse", ".4g", "mean squared error per coordinate"),
    ("L0", "l0", ".1f", "active latents per token"),
    ("dead", "dead_fraction", ".2%", "of latents: never active"),
    ("dense", "dense_fraction", ".2%", "of latents: active for over 10% of tokens"),
    ("utilization", "utilization", ".2%", "of latents in effective use: exp(entropy) / d_sae"),
    ("cosine", "cosine", ".4f", "similarity of a token and its reconstruction"),
    ("relative norm", "relative_norm", ".4f", "of a reconstruction and its token"),
)
LEFT_OUT: tuple[Row, ...] = (
    ("left out", "left_out", ",", "tokens of extreme norm, such as attention sinks"),
    ("FVU of all", "fvu_all", ".4f", "with those tokens"),
)
RECOVERED: tuple[Row, ...] = (
    ("recovered", "recovered_zero", ".2%", "of the damage of zero ablation"),
    ("recovered", "recovered_mean", ".2%", "of the damage of mean ablation"),
)


def _ablations(field: str) -> tuple[Row, ...]:
    return tuple(
        (f"  {kind}", f"{field}_{kind}", ".4f", f"with {kind} ablation instead of the SAE")
        for kind in ("zero", "mean")
    )


ENCODER: tuple[Row, ...] = (
    ("windows", "windows", ",", "of text embedded by the model with the SAE spliced in"),
    ("embeddings", "cosine", ".4f", "cosine similarity with the original ones"),
    ("  all", "cosine_all", ".4f", "with tokens of extreme norm replaced too"),
    *_ablations("cosine"),
    *RECOVERED,
)
CAUSAL: tuple[Row, ...] = (
    ("predicted", "tokens", ",", "next tokens, by the model with the SAE spliced in"),
    ("cross-entropy", "ce", ".4f", "nats per token"),
    ("  all", "ce_all", ".4f", "with tokens of extreme norm replaced too"),
    ("  clean", "ce_clean", ".4f", "of the original model"),
    *_ablations("ce"),
    ("KL", "kl", ".4f", "from the original model, nats per token"),
    *RECOVERED,
)


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

    max_norm_ratio: float | None = MAX_NORM_RATIO
    """Leave out tokens that are further from the mean than this multiple of the median distance,
    such as attention sinks; none keeps all. By default as in training."""

    windows: int = 128
    """Text windows to run the model on with the SAE spliced in; 0 skips the downstream
    evaluation."""

    batch_windows: int = 8
    """Windows per forward pass of the model."""

    model_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the model."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model."""

    device: str = "auto"
    """Device: auto (a GPU if available), cpu, cuda, or cuda:N."""

    def __post_init__(self):
        check_device(self.device)
        check_max_norm_ratio(self.max_norm_ratio)
        least = {"max_tokens": 1, "batch_size": 1, "windows": 0, "batch_windows": 1}
        for name, minimum in least.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {value}")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Results of `evaluate`."""

    data: str
    """Path of the activations."""

    reconstruction: Reconstruction
    """How well the SAE reconstructs them."""

    downstream: Downstream | None
    """Effect on the model's outputs; None if the model was not run."""

    not_run: str | None = None
    """Why the model was not run."""

    sae: str | None = None
    """Digest of the SAE's weights, if it was given."""


def evaluate(
    sae: SAE, data: StoredActivations, config: EvalConfig, progress: bool = True
) -> Evaluation:
    """Evaluate an SAE on `data`, within the limits of `config`. `sae` is moved to `config.device`.

    `config.data` is not read here; the command line opens it. Transcoders and crosscoders, whose
    data is `Joined`, are not spliced into the model. ValueError if a GPU is requested and there is
    none, or if the data does not fit the SAE.
    """
    sae = sae.to(choose_device(config.device))
    effect, not_run = None, _not_run(data, config)
    if not_run is None:
        assert isinstance(data, TextActivations)
        effect = downstream(
            sae,
            data,
            max_windows=config.windows,
            batch_size=config.batch_windows,
            model_dtype=config.model_dtype,
            max_norm_ratio=config.max_norm_ratio,
            trust_remote_code=config.trust_remote_code,
            progress=progress,
        )
    found = reconstruction(
        sae,
        data,
        max_tokens=config.max_tokens,
        batch_size=config.batch_size,
        max_norm_ratio=config.max_norm_ratio,
        progress=progress,
    )
    parts = data.sources if isinstance(data, Joined) else (data,)
    where = " + ".join(str(getattr(part, "path", None) or part) for part in parts)
    return Evaluation(data=where, reconstruction=found, downstream=effect, not_run=not_run)


def _not_run(data: StoredActivations, config: EvalConfig) -> str | None:
    """Why the model cannot run with the SAE spliced in, if it cannot."""
    if not config.windows:
        return "windows is 0"
    if not isinstance(data, TextActivations) or data.model is None:
        return "the data has no model"
    if data.hookpoint is None:
        return "the data is not from a single hookpoint"
    if not data.has_contexts:
        return "the data's text is unknown; a stream knows that of its held-out rows only"
    return None


def read_evaluation(path: Path) -> Evaluation:
    """The evaluation that `fastsae eval` wrote to a JSON file; ValueError names what is invalid."""
    values = read_json(path)
    found = values.get("downstream") if isinstance(values, dict) else None
    if not isinstance(found, dict):
        return from_dict(Evaluation, values, str(path))
    kind = CausalEffect if "ce" in found else EncoderEffect
    effect = from_dict(kind, found, f"{path}: downstream")
    return replace(
        from_dict(Evaluation, {**values, "downstream": None}, str(path)), downstream=effect
    )


def evaluation_table(result: Evaluation, activation: str = "") -> str:
    """The results of an SAE of this activation in aligned columns: name, value, meaning, and for
    some of them whether it is good."""
    rows = evaluation_rows(result, activation)
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(
        f"  {name:<{widths[0]}}  {value:>{widths[1]}}  {text}" for name, value, text in rows
    )


def evaluation_rows(result: Evaluation, activation: str = "") -> list[tuple[str, str, str]]:
    """Name, value and meaning of each result, and for some of them whether it is good."""
    found, effect = result.reconstruction, result.downstream
    left_out = LEFT_OUT if found.left_out else ()
    rows = _rows(found, RECONSTRUCTION + left_out, activation) + [
        (f"PC retention {rank}", f"{value:.4f}", f"of the {rank} leading principal components")
        for rank, value in found.pc_retention.items()
    ]
    if effect is None:
        rows.append(("model", "-", f"not run: {result.not_run}"))
    else:
        rows += _rows(effect, ENCODER if isinstance(effect, EncoderEffect) else CAUSAL, activation)
    return rows


def _rows(result: object, table: tuple[Row, ...], activation: str) -> list[tuple[str, str, str]]:
    rows = []
    for name, field, form, text in table:
        value = getattr(result, field)
        if value is not None and field in LIMITS:
            text += f": {verdict(field, value, activation)[0]}"
        rows.append((name, "-" if value is None else format(value, form), text))
    return rows
