"""What a finished run leaves in its folder: the SAE, its numbers and its curves."""

from typing import TYPE_CHECKING

import fastsae.interop as interop
from fastsae.data import stored
from fastsae.distributed.parallelize import per_latent
from fastsae.evals import Reconstruction, reconstruction
from fastsae.files import write_json
from fastsae.meeting import on_first
from fastsae.nn import SAE
from fastsae.sharded import save_sharded

from .curves import plot_curves
from .describe import describe
from .facts import facts_of
from .log import read_lines
from .origin import local_in, origin_of
from .state import TrainState
from .summary import Summary

if TYPE_CHECKING:
    from .trainer import Trainer

EVALUATION_TOKENS = 65536

EVALUATION_BATCH = 1024
"""Tokens that are evaluated at a time: their copies in float64 then take less memory than a
step."""


def write_results(trainer: "Trainer", state: TrainState, sae: SAE) -> None:
    """Save the SAE of a run, for activations as they are, and evaluate it; this leaves it on the
    trainer's device."""
    config, source, shards = trainer.config, trainer.source, trainer.shards
    if shards.size == 1:
        sae.save(config.out / "sae")
    else:
        names = per_latent(sae)
        save_sharded(sae.state_dict(), sae.config(), config.out / "sae", names, shards)
    exported = on_first(shards, lambda: export(trainer, sae))
    trainer.release_memory()  # of transposed weights
    result = reconstruction(
        sae,
        source.heldout or stored(source),
        max_tokens=EVALUATION_TOKENS,
        batch_size=EVALUATION_BATCH,
        device=trainer.device,
        max_norm_ratio=config.max_norm_ratio,
    )
    on_first(shards, lambda: write_numbers(trainer, state, sae, result, exported))


def write_numbers(
    trainer: "Trainer", state: TrainState, sae: SAE, result: Reconstruction, exported: str
) -> None:
    """Write summary.json and the plot of the training curves."""
    config, source = trainer.config, trainer.source
    # First: matplotlib takes memory that is not the run's.
    facts = trainer.memory and facts_of(trainer, state, trainer.memory)
    lines = read_lines(config.out / "metrics.jsonl")
    heldout = {"fvu": result.fvu, "l0": result.l0, "dead_fraction": result.dead_fraction}
    found = heldout if source.heldout else {}
    plot_curves(lines, config.out / "curves.png", describe(trainer, sae), found)
    summary: Summary = {
        "fvu": result.fvu,
        "fvu_all": result.fvu_all,
        "l0": result.l0,
        "dead_fraction": result.dead_fraction,
        "evaluated_on": "held-out data" if source.heldout else "training data",
        "evaluated_tokens": result.tokens,
        "left_out_of_evaluation": result.left_out,
        "tokens": state.tokens,
        "left_out_tokens": int(state.left_out),
        "gamma": tuple(part.gamma for part in trainer.ordinary),
        "tokens_per_second": state.tokens / state.seconds,
        "seconds": state.seconds,
        "step_path": trainer.plan.step,
        "sae_lens": exported,
        "activation": config.activation.name,
    }
    if facts is not None:
        summary["facts"] = facts
    if origin := origin_of(trainer.columns):
        summary["origin"], summary["local"] = origin, local_in(origin)
    if state.stopped is not None:
        summary["ended_early"], _ = state.stopped
    write_json(config.out / "summary.json", summary)


def export(trainer: "Trainer", sae: SAE) -> str:
    """Also save the SAE for SAELens in sae_lens/: the folder, or why it is not supported."""
    folder = trainer.config.out / "sae_lens"
    if trainer.shards.latent > 1:
        return "none: no process holds the whole SAE; use fastsae convert"
    try:
        interop.save(sae, folder, "sae_lens", **origin_of(trainer.columns))
    except ValueError as error:
        return f"none: {error}"
    return str(folder)
