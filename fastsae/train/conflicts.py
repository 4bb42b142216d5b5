"""The settings of a run that cannot be combined, as tables."""

from collections.abc import Callable
from typing import Any

from fastsae.distributed.parallelize import why_not_divided
from fastsae.nn import SAE, TopKConfig
from fastsae.shards import Shards

Rules = list[tuple[str, Callable[[Any], Any]]]
"""What is said of a TrainConfig c, with {c.name} for a setting, and the condition for it."""

CONFLICTS: Rules = [
    (
        "give either data or a model, got both: {c.data} and {c.stream.model}",
        lambda c: c.data is not None and c.stream is not None,
    ),
    (
        "steps must be given with a model: the length of its text is unknown",
        lambda c: c.stream is not None and c.steps is None,
    ),
    (
        "give either a target (transcoder) or layers (crosscoder), got both",
        lambda c: c.target is not None and c.layers,
    ),
    (
        "patience = {c.patience} needs eval_every",
        lambda c: c.patience is not None and c.eval_every is None,
    ),
    ("wandb_artifacts has no effect without wandb", lambda c: c.wandb_artifacts and not c.wandb),
    ("skip has no effect without a target", lambda c: c.skip and c.target is None),
    (
        "by_norm has no effect with layers: crosscoders always use it",
        lambda c: c.by_norm and c.layers,
    ),
    (
        'by_norm has no effect with constraint "unit", which keeps decoder norms at 1: choose '
        "another constraint",
        lambda c: c.by_norm and c.optimizer.constraint == "unit",
    ),
    (
        'constraint "aligned" needs an autoencoder, got a target',
        lambda c: c.optimizer.constraint == "aligned" and c.target is not None,
    ),
    (
        'constraint "aligned" needs a tied encoder, got "{c.init.encoder}"',
        lambda c: c.optimizer.constraint == "aligned" and c.init.encoder != "tied",
    ),
    (
        'row_norm = {c.init.row_norm} needs constraint "none", got "{c.optimizer.constraint}"',
        lambda c: c.init.row_norm != 1 and c.optimizer.constraint != "none",
    ),
    (
        'downstream "{c.downstream}" needs a model to run, got data: {c.data}',
        lambda c: c.downstream != "none" and c.data is not None,
    ),
    (
        'downstream "{c.downstream}" needs an autoencoder, got a target (transcoder)',
        lambda c: c.downstream != "none" and c.target is not None,
    ),
    (
        'downstream "{c.downstream}" needs an autoencoder, got layers (crosscoder)',
        lambda c: c.downstream != "none" and c.layers,
    ),
    (
        'downstream_coef = {c.downstream_coef} has no effect with downstream "none"',
        lambda c: c.downstream == "none" and c.downstream_coef != 1,
    ),
    (
        'downstream_windows = {c.downstream_windows} has no effect with downstream "none"',
        lambda c: c.downstream == "none" and c.downstream_windows != 8,
    ),
]

STEP_CONFLICTS: Rules = [
    (
        '{c.needs_autograd} needs the autograd step, got step "fused"',
        lambda c: c.step == "fused" and c.needs_autograd,
    ),
    (
        'encoder_precision "{c.encoder_precision}" needs the fused step, got {c.not_fused}',
        lambda c: c.not_fused and c.encoder_precision not in ("auto", "fp32"),
    ),
    (
        'adam_moments "{c.optimizer.adam_moments}" needs the fused step, got {c.not_fused}',
        lambda c: c.not_fused and c.optimizer.adam_moments != "fp32",
    ),
    (
        "adam_window = {c.optimizer.adam_window} needs the fused step, got {c.not_fused}",
        lambda c: c.not_fused and c.optimizer.adam_window > 1,
    ),
    (
        '{c.not_captured} cannot be captured, got cuda_graph "on"',
        lambda c: c.cuda_graph == "on" and c.not_captured,
    ),
]

NEEDS_AUTOGRAD: Rules = [
    ("a transcoder", lambda c: c.target is not None),
    ("a crosscoder", lambda c: c.layers),
    ("by_norm", lambda c: c.by_norm),
    ('gradient "rotation"', lambda c: getattr(c.activation, "gradient", None) == "rotation"),
    ('activation "{c.activation.name}"', lambda c: not c.activation.build().supports_fused_step),
    ("prefixes or multi_k", lambda c: not c.objective.plain),
    ('constraint "{c.optimizer.constraint}"', lambda c: c.optimizer.constraint != "unit"),
    ("downstream", lambda c: c.downstream != "none"),
    ("clip", lambda c: c.optimizer.clip is not None),
]

NOT_CAPTURED: Rules = [
    ("{c.not_fused}", lambda c: c.not_fused),
    ('activation "{c.activation.name}"', lambda c: not isinstance(c.activation, TopKConfig)),
]


MESH_CONFLICTS: Rules = [
    ("downstream", lambda c: c.downstream != "none"),
    ("a CUDA graph", lambda c: c.cuda_graph == "on"),
]
"""What a run in several processes does not support."""

DATA_CONFLICTS: Rules = [
    ("{c.not_fused}", lambda c: c.not_fused),
]
"""What a mesh does not support whose data axis is longer than 1."""


def check_mesh(config: Any, shards: Shards, start_from: SAE | None) -> None:
    """ValueError unless the processes can train the SAE of this config together."""
    if shards.size == 1:
        return
    size, latent, data = shards.size, shards.latent, shards.data
    if start_from is not None:
        raise ValueError("many processes cannot start from an SAE: use one")
    if reason := first(MESH_CONFLICTS, config):
        raise ValueError(f"{reason} needs one process, got {size}")
    if data > 1 and (reason := first(DATA_CONFLICTS, config)):
        raise ValueError(f"{reason} needs a mesh with data=1, got data={data}")
    if latent > 1 and (reason := why_not_divided(config.activation.build())):
        raise ValueError(f"{reason} needs a mesh with latent=1, got latent={latent}")
    if config.d_sae % latent:
        raise ValueError(f"d_sae must be divisible by latent={latent}, got {config.d_sae}")
    if latent > 1 and config.d_sae // latent % (window := config.optimizer.adam_window):
        raise ValueError(
            f"with adam_window = {window}, each process must have a multiple of {window} latents, "
            f"got {config.d_sae // latent}"
        )
    if config.batch_size % size:
        raise ValueError(
            f"batch_size must be divisible by the number of processes, {size}, "
            f"got {config.batch_size}"
        )


def first(rules: Rules, config: Any) -> str | None:
    """The first that is true of the config, if any is."""
    return next((text.format(c=config) for text, holds in rules if holds(config)), None)


def check(rules: Rules, config: Any) -> None:
    """ValueError for the first that is true of the config."""
    if conflict := first(rules, config):
        raise ValueError(conflict)
