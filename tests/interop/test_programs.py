"""The libraries' own programs on a tiny model, with their library accelerated and as it is."""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from pathlib import Path
from runpy import run_module
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import fastsae
from fastsae.dropin.__main__ import main
from fastsae.dropin.dense import MIN_TOKENS

from .peers import D_IN, D_SAE, K, dictionary_learning, sae_lens, sparsify

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries

STEPS, N, VOCABULARY, CONTEXT = 6, 2 * MIN_TOKENS, 50, 16


def token_ids() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(
        VOCABULARY, (STEPS * N // CONTEXT + 64, CONTEXT), generator=generator
    ).tolist()


def run_sae_lens(folder: Path) -> dict[str, Any]:
    """LanguageModelSAETrainingRunner, as its tutorial uses it."""
    sae_lens()
    library, lens = import_module("sae_lens"), import_module("transformer_lens")
    data = import_module("datasets").Dataset.from_dict({"tokens": token_ids()})
    torch.manual_seed(0)
    model = lens.HookedTransformer(
        lens.HookedTransformerConfig(
            n_layers=1,
            d_model=D_IN,
            n_ctx=CONTEXT,
            d_head=4,
            d_vocab=VOCABULARY,
            act_fn="relu",
            device="cpu",
        )
    )
    cfg = library.LanguageModelSAERunnerConfig(
        sae=library.BatchTopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=float(K)),
        hook_name="blocks.0.hook_resid_post",
        is_dataset_tokenized=True,
        prepend_bos=False,
        context_size=CONTEXT,
        train_batch_size_tokens=N,
        training_tokens=STEPS * N,
        store_batch_size_prompts=8,
        n_batches_in_buffer=64,
        device="cpu",
        logger=library.LoggingConfig(log_to_wandb=False),
        output_path=str(folder / "out"),
        checkpoint_path=str(folder / "checkpoints"),
        lr=1e-2,
    )
    torch.manual_seed(0)
    sae = library.LanguageModelSAETrainingRunner(
        cfg, override_dataset=data, override_model=model
    ).run()
    return dict(sae.state_dict()) | {"class": type(sae).__name__}


def run_dictionary_learning(folder: Path) -> dict[str, Any]:
    """trainSAE, on batches of activations."""
    trainers = dictionary_learning("trainers.gdm")
    training = dictionary_learning("training")
    generator = torch.Generator().manual_seed(3)
    batches = [torch.randn(N, D_IN, generator=generator) for _ in range(STEPS)]
    settings = {"trainer": trainers.GatedSAETrainer, "activation_dim": D_IN, "dict_size": D_SAE}
    settings |= {"layer": 0, "lm_name": "none", "steps": STEPS, "device": "cpu", "seed": 0}
    settings |= {"warmup_steps": 1, "sparsity_warmup_steps": 2}
    training.trainSAE(batches, [settings], STEPS, save_dir=str(folder), device="cpu")
    return torch.load(folder / "trainer_0" / "ae.pt", weights_only=True)


PROGRAMS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "sae_lens": run_sae_lens,
    "dictionary_learning": run_dictionary_learning,
}


@pytest.mark.parametrize("library", PROGRAMS)
def test_a_program_trains_to_the_same_weights(library, tmp_path):
    found = []
    for patch in (nullcontext, partial(fastsae.accelerate, library)):
        with patch():
            found.append(PROGRAMS[library](tmp_path / str(len(found))))
    theirs, ours = found
    names = [one.pop("class", None) for one in found]
    assert names[0] is None or names[1] == f"Fast{names[0]}"
    assert all(torch.isfinite(p).all() for p in theirs.values())
    assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_the_command_of_sparsify(tmp_path, monkeypatch):
    """`python -m fastsae.dropin sparsify -m sparsify` and `python -m sparsify`, which has no option
    for a CPU."""
    sparsify()
    import datasets
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=D_IN, n_layer=1, n_head=2
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    datasets.Dataset.from_dict({"input_ids": token_ids()}).save_to_disk(tmp_path / "data")
    load = transformers.AutoModel.from_pretrained

    def on_cpu(*arguments: Any, **settings: Any) -> Any:
        return load(*arguments, **settings | {"device_map": {"": "cpu"}})

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", on_cpu)
    found = []
    for patch in ("none", "sparsify"):
        words = ["-m", "sparsify", str(tmp_path / "model"), str(tmp_path / "data")]
        words += ["--num_latents", str(D_SAE), "--k", str(K), "--batch_size", str(N // CONTEXT)]
        words += [
            "--ctx_len",
            str(CONTEXT),
            "--save_dir",
            str(tmp_path / patch),
            "--hookpoints",
            "h.0",
        ]
        words += ["--log_to_wandb", "False", "--max_examples", str(STEPS * N // CONTEXT)]
        words += ["--auxk_alpha", "0.03", "--optimizer", "adam", "--lr", "0.01"]
        torch.manual_seed(0)
        if patch == "none":
            monkeypatch.setattr(sys, "argv", words[1:])
            run_module("sparsify", run_name="__main__", alter_sys=True)
        else:
            monkeypatch.setattr(sys, "argv", ["", "--exact-compat", "sparsify", *words])
            main()
        found.append(load_file(tmp_path / patch / "unnamed" / "h.0" / "sae.safetensors"))
    theirs, ours = found
    assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
