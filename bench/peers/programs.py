"""Compares whole training programs of other libraries before and after `fastsae.accelerate`.

SAELens' LanguageModelSAETrainingRunner and the command of sparsify train on the activations of a
tiny transformer with random weights, dictionary_learning's trainSAE on Gaussian ones, so that most
of the time is the SAE's. In each round, both programs train the same SAE on the same batches. Times
are of all processor cores, with loading and saving, without imports; use OMP_NUM_THREADS=1, as
waiting threads count. FVU is on held-out tokens. With its option --exact-compat, sparsify's
gradients are its own, otherwise the true ones.

Results go to bench/results/programs-MAKER.json. Installation as for `python -m bench peers`.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from runpy import run_module
from statistics import median
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

import fastsae
from bench import record
from bench.clock import summary
from bench.problem import check_names, parse_shape
from fastsae.dropin.__main__ import main as run_accelerated
from fastsae.memory import keep_freed_memory

CONTEXT = 16
"""Tokens of a text."""

SHAPE = "1024,256,4096,32"


class Work(NamedTuple):
    """What a program trains: tokens per step, width, latents, active latents per token, steps,
    learning rate, and tokens that the model knows."""

    tokens: int
    d_in: int
    d_sae: int
    k: int
    steps: int
    lr: float = 1e-3
    vocabulary: int = 5000

    def texts(self) -> list[list[int]]:
        """Random tokens, some more than are trained on."""
        generator = torch.Generator().manual_seed(0)
        shape = self.steps * self.tokens // CONTEXT + 64, CONTEXT
        return torch.randint(self.vocabulary, shape, generator=generator).tolist()

    def heldout(self) -> Tensor:
        """Texts that are not trained on."""
        generator = torch.Generator().manual_seed(1)
        return torch.randint(self.vocabulary, (2048 // CONTEXT, CONTEXT), generator=generator)


class Trained(NamedTuple):
    """Where a program saved its SAE, and held-out activations of the kind that it trained on."""

    folder: Path
    heldout: Tensor


def run_sae_lens(folder: Path, work: Work, accelerate: bool, kind: str = "TopK") -> Trained:
    """LanguageModelSAETrainingRunner, as its tutorial uses it."""
    library, lens = import_module("sae_lens"), import_module("transformer_lens")
    data = import_module("datasets").Dataset.from_dict({"tokens": work.texts()})
    torch.manual_seed(0)
    model = lens.HookedTransformer(
        lens.HookedTransformerConfig(
            n_layers=1,
            d_model=work.d_in,
            n_ctx=CONTEXT,
            d_head=4,
            d_vocab=work.vocabulary,
            act_fn="relu",
            initializer_range=1.0,
            device="cpu",
        )
    )
    hook = "blocks.0.hook_resid_post"
    cfg = library.LanguageModelSAERunnerConfig(
        sae=getattr(library, f"{kind}TrainingSAEConfig")(
            d_in=work.d_in, d_sae=work.d_sae, k=work.k
        ),
        hook_name=hook,
        is_dataset_tokenized=True,
        prepend_bos=False,
        context_size=CONTEXT,
        train_batch_size_tokens=work.tokens,
        training_tokens=work.steps * work.tokens,
        store_batch_size_prompts=8,
        n_batches_in_buffer=64,
        device="cpu",
        logger=library.LoggingConfig(log_to_wandb=False),
        output_path=str(folder),
        checkpoint_path=str(folder / "checkpoints"),
        lr=work.lr,
    )
    torch.manual_seed(0)
    with fastsae.accelerate("sae_lens") if accelerate else nullcontext():
        library.LanguageModelSAETrainingRunner(
            cfg, override_dataset=data, override_model=model
        ).run()
    with torch.no_grad():
        _, cache = model.run_with_cache(work.heldout(), names_filter=hook)
    return Trained(folder, cache[hook].flatten(0, 1))


def run_dictionary_learning(
    folder: Path, work: Work, accelerate: bool, trainer: str = "top_k.TopKTrainer"
) -> Trained:
    """trainSAE, on batches of activations, with one of the library's trainers."""
    module, _, name = trainer.partition(".")
    trainers = import_module(f"dictionary_learning.trainers.{module}")
    training = import_module("dictionary_learning.training")
    generator = torch.Generator().manual_seed(3)
    *batches, heldout = (
        torch.randn(work.tokens, work.d_in, generator=generator) for _ in range(work.steps + 1)
    )
    settings = {"trainer": getattr(trainers, name), "activation_dim": work.d_in, "seed": 0}
    settings |= {"dict_size": work.d_sae, "steps": work.steps, "lr": work.lr, "warmup_steps": 1}
    settings |= {"layer": 0, "lm_name": "none", "device": "cpu"}
    settings |= {"k": work.k} if "TopK" in name else {"sparsity_warmup_steps": 2}
    with fastsae.accelerate("dictionary_learning") if accelerate else nullcontext():
        training.trainSAE(batches, [settings], work.steps, save_dir=str(folder), device="cpu")
    return Trained(folder / "trainer_0", heldout)


def run_sparsify(folder: Path, work: Work, accelerate: bool, exact: bool = False) -> Trained:
    """`python -m sparsify`, or `python -m fastsae.dropin sparsify -m sparsify`, if `exact` with the
    library's own gradients. The command has no option for a CPU."""
    datasets, transformers = import_module("datasets"), import_module("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=work.vocabulary, n_positions=CONTEXT, n_embd=work.d_in, n_layer=2, n_head=2
    )
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(folder / "model")
    datasets.Dataset.from_dict({"input_ids": work.texts()}).save_to_disk(folder / "data")
    argv = ["sparsify", str(folder / "model"), str(folder / "data")]
    argv += ["--num_latents", str(work.d_sae), "--k", str(work.k), "--ctx_len", str(CONTEXT)]
    argv += ["--batch_size", str(work.tokens // CONTEXT), "--save_dir", str(folder)]
    argv += ["--hookpoints", "h.0", "--log_to_wandb", "False", "--auxk_alpha", "0.03"]
    argv += ["--max_examples", str(work.steps * work.tokens // CONTEXT)]
    argv += ["--optimizer", "adam", "--lr", str(work.lr)]
    load = transformers.AutoModel.from_pretrained

    def on_cpu(*arguments: Any, **settings: Any) -> Any:
        return load(*arguments, **settings | {"device_map": {"": "cpu"}})

    if accelerate:
        argv = ["", *["--exact-compat"] * exact, "sparsify", "-m", *argv]
    # In Triton's interpreter, sparsify's decode reads weights in the wrong order.
    triton = {} if torch.cuda.is_available() else {"SPARSIFY_DISABLE_TRITON": "1"}
    torch.manual_seed(0)
    with (
        patch.dict(os.environ, triton),
        patch.object(transformers.AutoModel, "from_pretrained", on_cpu),
        patch.object(sys, "argv", argv),
    ):
        if accelerate:
            run_accelerated()
        else:
            run_module("sparsify", run_name="__main__", alter_sys=True)
    with torch.no_grad():  # the last of the hidden states would be normalized
        states = model.eval()(work.heldout(), output_hidden_states=True).hidden_states
    return Trained(folder / "unnamed" / "h.0", states[1].flatten(0, 1))


Program = Callable[[Path, Work, bool], Trained]
PROGRAMS: dict[str, Program] = {
    "sae_lens": run_sae_lens,
    "dictionary_learning": run_dictionary_learning,
    "sparsify": run_sparsify,
    "sparsify --exact-compat": partial(run_sparsify, exact=True),
}
PACKAGES = {
    "sae_lens": "sae-lens",
    "dictionary_learning": "dictionary-learning",
    "sparsify": "eai-sparsify",
}
"""What pip calls each library."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--programs", nargs="+", help="which to run, as in the results (default: all)")
    add("--shape", default=SHAPE, help=f"a letter, or tokens,d_in,d_sae,k (default: {SHAPE})")
    add("--steps", type=int, default=60, help="steps of training (default: 60)")
    add("--rounds", type=int, default=5, help="rounds of two runs each (default: 5)")


def bench(arguments: argparse.Namespace) -> None:
    """Measure, record and print."""
    check_names("programs", arguments.programs, PROGRAMS)
    work = Work(*parse_shape(arguments.shape), arguments.steps)
    keep_freed_memory()  # as fastsae's trainer does; it helps the libraries as well
    rows = {}
    for name in arguments.programs or PROGRAMS:
        rows[name] = record.attempt(partial(measure, name, work, arguments.rounds))
        record.write(f"programs-{record.machine()}", {name: rows[name]})
    titles = ["", "library", "accelerated", "ratio", "held-out FVU"]
    print(record.markdown(titles, map(cells, rows, rows.values())))


def measure(name: str, work: Work, rounds: int) -> dict[str, Any]:
    """A program's comparison, with its library's version."""
    package = PACKAGES[name.split()[0]]
    about = {"versions": {package: version(package)}, "rounds": rounds}
    return about | compare(PROGRAMS[name], work, rounds)


def compare(program: Program, work: Work, rounds: int) -> dict[str, Any]:
    """Seconds of all processor cores, the median of the rounds' ratios, and the FVU of both SAEs.

    A round before the first is for imports and warm-up. Which of the two is first alternates.
    """
    times: dict[bool, list[float]] = {False: [], True: []}
    fvus: dict[bool, float] = {}
    for number in range(-1, rounds):
        for accelerate in (False, True) if number % 2 else (True, False):
            with tempfile.TemporaryDirectory() as folder:
                start = time.process_time()
                trained = program(Path(folder), work, accelerate)
                took = time.process_time() - start
                fvus[accelerate] = fvu(trained)
            if number >= 0:
                times[accelerate].append(took)
    ratios = [before / after for before, after in zip(times[False], times[True], strict=True)]
    return {
        **work._asdict(),
        "library": {"cpu s": summary(times[False]), "FVU": round(fvus[False], 4)},
        "accelerated": {"cpu s": summary(times[True]), "FVU": round(fvus[True], 4)},
        "ratio": round(median(ratios), 3),
        "ratio range": [round(min(ratios), 3), round(max(ratios), 3)],
    }


@torch.no_grad()
def fvu(trained: Trained) -> float:
    """Held-out fraction of variance unexplained of the SAE that a program saved."""
    x = trained.heldout
    residual = fastsae.load(trained.folder)(x) - x
    return float(residual.square().sum() / (x - x.mean(0)).square().sum())


def cells(name: str, row: dict[str, Any]) -> list[object]:
    if "error" in row:
        return [name, row["error"], "", "", ""]
    before, after = row["library"], row["accelerated"]
    low, high = row["ratio range"]
    seconds = [f"{one['cpu s']['median']:.1f} s" for one in (before, after)]
    ratio, fvus = f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})", (before["FVU"], after["FVU"])
    return [name, *seconds, ratio, "{:.4f} / {:.4f}".format(*fvus)]
