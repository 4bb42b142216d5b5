"""fastsae eval: the metrics of a trained SAE."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fastsae.config import to_dict
from fastsae.data import StoredActivations, open_path, stored
from fastsae.distributed.launch import joined, one_voice, place
from fastsae.evals import EvalConfig, evaluate, evaluation_table
from fastsae.files import write_json
from fastsae.interop import load_divided
from fastsae.train.run_folder import stored_fingerprint, weights_digest

from .finished import trained_on, trained_with
from .parse import filled, read_words
from .train import opened


@dataclass(frozen=True, kw_only=True)
class Eval(EvalConfig):
    """Evaluate a trained SAE on held-out activations, and spliced into its model."""

    run: Path
    """Directory of a run or of a saved SAE, from fastsae or another library."""


def main(words: Sequence[str]) -> str:
    with one_voice():
        given = read_words(words)
        command = filled(Eval, given, ["run"])
        run = command.run
        if not run.is_dir():
            raise ValueError(f"{run} is not a directory, where the results could go")
        if "max_norm_ratio" not in dict(given) and (config := trained_with(run)):
            command = replace(command, max_norm_ratio=config.max_norm_ratio)
    # Under torchrun, all processes divide the latents, and see the same tokens.
    with joined(f"latent={place().size}", command.device) as shards:
        data = eval_data(run, command.data)
        sae = load_divided(run, shards)
        result = evaluate(sae, data, command, shards.rank == 0)
        if shards.rank:
            return ""
        whole = {"sae": weights_digest(sae)} if shards.size == 1 else {}
        write_json(run / "eval.json", whole | to_dict(result))
        about = f"{run} on {result.data}{', its training data' * trained_on(run, data)}:"
        return f"{about}\n{evaluation_table(result)}\nwritten to {run / 'eval.json'}"


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
