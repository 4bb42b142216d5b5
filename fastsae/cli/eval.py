"""fastsae eval: the metrics of a trained SAE."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fastsae.config import to_dict
from fastsae.data import StoredActivations, open_path, stored
from fastsae.device import choose_device
from fastsae.distributed.launch import joined, one_voice, place
from fastsae.evals import EvalConfig, evaluate, evaluation_table
from fastsae.evals.verdict import LIMITS, remarks
from fastsae.files import write_json
from fastsae.interop import detect, load_divided
from fastsae.memory import memory_left
from fastsae.progress import say
from fastsae.shards import Shards
from fastsae.train.run_folder import stored_fingerprint, weights_digest

from .finished import trained_on, trained_with
from .parse import filled, read_words
from .train import opened


@dataclass(frozen=True, kw_only=True)
class Eval(EvalConfig):
    """Evaluate a trained SAE on held-out activations, and spliced into its model."""

    run: Path
    """Directory of a run or of a saved SAE, from fastsae or another library."""

    mesh: str | None = None
    """Under torchrun, how many processes divide the tokens, and the latents: data=2,latent=4
    (default: all divide the tokens; if the SAE takes more than half of the memory that a process
    has, those of a machine divide the latents)."""


def main(words: Sequence[str]) -> str:
    with one_voice():
        given = read_words(words)
        command = filled(Eval, given, ["run"])
        run = command.run
        if not run.is_dir():
            raise ValueError(f"{run} is not a directory, where the results could go")
        if "max_norm_ratio" not in dict(given) and (config := trained_with(run)):
            command = replace(command, max_norm_ratio=config.max_norm_ratio)
    with joined(command.mesh or f"data={place().size}", command.device) as shards:
        if command.mesh is None:
            shards = divided_if_large(run, choose_device(command.device), shards)
        data = eval_data(run, command.data)
        sae = load_divided(run, shards)
        result = evaluate(sae, data, command, shards.rank == 0)
        if shards.rank:
            return ""
        if shards.latent == 1:  # else no process has all weights
            result = replace(result, sae=weights_digest(sae))
        write_json(run / "eval.json", to_dict(result))
        about = f"{run} on {result.data}{', its training data' * trained_on(run, data)}:"
        activation, parts = sae.activation.cfg.name, (result.reconstruction, result.downstream)
        values = {n: getattr(part, n) for part in parts for n in LIMITS if hasattr(part, n)}
        lines = [about, evaluation_table(result, activation), *remarks(values, activation)]
        return "\n".join([*lines, f"written to {run / 'eval.json'}"])


def divided_if_large(run: Path, device: str, shards: Shards) -> Shards:
    """The processes, or a mesh of them that divides the latents if an SAE is too large for one."""
    if shards.size == 1:
        return shards
    _, files = detect(run)
    size = sum(file.stat().st_size for file in files)
    left = min(shards.all_of(memory_left(device, place().local_size)))
    if 2 * size <= left:
        return shards
    if shards.rank == 0:
        say(
            f"the SAE takes {size / 1e9:.1f} GB, more than half of the {left / 1e9:.1f} GB that a "
            f"process has: the processes of a machine divide the latents"
        )
    latent = place().local_size
    return shards.part(shards.size // latent, latent)


def eval_data(run: Path, data: Path | None) -> StoredActivations:
    """The data asked for, or what the run was trained on; the held-out part of either."""
    if data is not None:
        source = open_path(data)
    elif config := trained_with(run):
        stream = config.stream and replace(config.stream, model_device=None)
        here = replace(config, device="auto", stream=stream)  # the run's devices may not be here
        _, source = opened({"": here}, fill=False)
        if config.data is None and stored_fingerprint(run) != source.fingerprint:
            raise ValueError(
                f"the data that {run} was trained on are not here: say which --data to evaluate on"
            )
    else:
        raise ValueError(f"{run} is not a run's folder: say which --data to evaluate on")
    return source.heldout or stored(source)
