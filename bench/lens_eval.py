"""Runs SAELens' own evaluation and SAEBench's core on an SAE as fastsae exported it.

    python -m bench.lens_eval RUN --text DIRECTORY

Both load RUN/sae_lens and run the model that its metadata name at the hookpoint that they name, on
contexts of the length that they give. They do so twice, the second time after `fastsae.accelerate`,
which must not change a number by more than rounding. Results go to
bench/results/sae-lens-eval.json.

The committed results are of SmolLM2 (docs/smollm.md), saved as TransformerLens reads it:

    model = AutoModelForCausalLM.from_pretrained("smollm", gguf_file=NAME)
    config = copy.deepcopy(model.config)
    del config.quantization_config
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained("model")  # likewise the tokenizer

    fastsae harvest --model model --text topics --hookpoint model.layers.15 --prepend-bos yes \\
      --drop-first --max-tokens 12000 --heldout-fraction 0.1 --out smol
    fastsae train --data smol --out runs/smol --d-sae 1152 --k 32 --steps 120 --batch-size 512
    python -m bench.lens_eval runs/smol --text topics --name "SmolLM2-135M layer 15" --batches 1

It needs sae-lens and sae-bench, in an environment of their own:

    pip install -c constraints.txt -e '.[peers]' seaborn tabulate && pip uninstall torchvision
    pip install --no-deps sae-bench==0.6.0 # it asks for older versions of datasets and numpy
"""

# pyright: reportMissingImports=false
import argparse
import json
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fastsae
from fastsae.data.text import text_files

from .record import markdown, write

PROMPTS = 8
"""Contexts per batch."""

KINDS = "exported", "accelerated"
LIBRARIES = "sae-lens", "sae-bench", "transformer-lens", "transformers", "fastsae-triton"


def load(run: Path) -> Any:
    """The exported SAE, by SAELens.

    TransformerLens loads the models of a list, by their names on the hub. The directory of a model,
    which it can load as well, must therefore be in that list.
    """
    from sae_lens import SAE
    from transformer_lens.loading_from_pretrained import OFFICIAL_MODEL_NAMES

    sae = SAE.load_from_disk(run / "sae_lens", device="cpu")
    name = sae.cfg.metadata.model_name
    if Path(name).is_dir() and name not in OFFICIAL_MODEL_NAMES:
        OFFICIAL_MODEL_NAMES.append(name)
    return sae


def sae_lens(sae: Any, texts: Path, batches: int) -> dict[str, dict[str, float]]:
    """The metrics of SAELens' `run_evals`."""
    from datasets import load_dataset
    from sae_lens import ActivationsStore
    from sae_lens.evals import get_eval_everything_config, run_evals
    from sae_lens.load_model import load_model
    from sae_lens.training.activation_scaler import ActivationScaler

    about = sae.cfg.metadata
    kwargs = about.model_from_pretrained_kwargs
    model = load_model(about.model_class_name, about.model_name, "cpu", kwargs)
    dataset = load_dataset(str(texts), split="train")
    store = ActivationsStore.from_sae(model, sae, dataset, streaming=False)
    config = get_eval_everything_config(PROMPTS, batches, batches)
    metrics, _ = run_evals(sae, store, model, ActivationScaler(), config)
    return metrics


def sae_bench_core(sae: Any, texts: Path, batches: int) -> dict[str, dict[str, float]]:
    """The metrics of SAEBench's core, from its `multiple_evals`."""
    from sae_bench.evals.core.main import multiple_evals

    with tempfile.TemporaryDirectory() as folder:
        (result,) = multiple_evals(
            [("fastsae", sae)],
            n_eval_reconstruction_batches=batches,
            n_eval_sparsity_variance_batches=batches,
            eval_batch_size_prompts=PROMPTS,
            compute_featurewise_density_statistics=True,
            compute_featurewise_weight_based_metrics=True,
            exclude_special_tokens_from_reconstruction=True,
            dataset=str(texts),
            context_size=sae.cfg.metadata.context_size,
            output_folder=folder,
            device="cpu",
        )
    return result["metrics"]


EVALUATIONS: dict[str, Callable[[Any, Path, int], dict[str, dict[str, float]]]] = {
    "SAELens": sae_lens,
    "SAEBench core": sae_bench_core,
}


def flat(metrics: dict[str, dict[str, float]]) -> dict[str, float]:
    return {name: float(value) for group in metrics.values() for name, value in group.items()}


def compare(evaluate: Callable[..., Any], run: Path, texts: Path, batches: int) -> dict[str, Any]:
    """The metrics as exported and accelerated, and the largest relative difference."""
    saes = load(run), fastsae.accelerate(load(run))
    exported, accelerated = (flat(evaluate(sae, texts, batches)) for sae in saes)
    difference, name = max(
        (abs(accelerated[name] - value) / max(abs(value), 1e-12), name)
        for name, value in exported.items()
    )
    found = dict(zip(KINDS, (exported, accelerated), strict=True))
    return {**found, "largest relative difference": difference, "of": name}


def write_texts(patterns: tuple[str, ...], folder: Path) -> None:
    """Text files as a dataset that both libraries open by its path."""
    lines = (json.dumps({"text": file.read_text("utf-8")}) for file in text_files(patterns))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.lens_eval", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", type=Path, help="directory of a `fastsae train` run")
    parser.add_argument("--text", nargs="+", required=True, help="text files or directories")
    parser.add_argument("--name", help="name in the results (default: the run's)")
    parser.add_argument("--batches", type=int, default=8, help="batches of contexts (default: 8)")
    args = parser.parse_args()
    config = json.loads((args.run / "sae_lens" / "cfg.json").read_text())
    metadata = config["metadata"]
    metadata["model_name"] = Path(metadata["model_name"]).name  # not where it is on this machine
    about: dict[str, Any] = {"config": config, "prompts": PROMPTS, "batches": args.batches}
    about["versions"] = {name: version(name) for name in LIBRARIES}
    with tempfile.TemporaryDirectory() as folder:
        write_texts(tuple(args.text), Path(folder))
        for name, evaluate in EVALUATIONS.items():
            about[name] = found = compare(evaluate, args.run, Path(folder), args.batches)
            names = found["exported"]
            rows = ((key, *(f"{found[kind][key]:.6g}" for kind in KINDS)) for key in names)
            print(markdown([name, *KINDS], rows), flush=True)
    write("sae-lens-eval", {args.name or args.run.name: about})


if __name__ == "__main__":
    main()
