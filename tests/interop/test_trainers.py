"""A few steps of the libraries' own trainers, with accelerated SAEs and their own."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import fastsae
from fastsae.dropin import dense
from fastsae.dropin.dense import MIN_TOKENS

from .peers import D_IN, D_SAE, K, dictionary_learning, sae_lens, sparsify

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries

STEPS, N = 5, 2 * MIN_TOKENS  # enough tokens to exercise the fast path


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(N, D_IN, generator=generator) for _ in range(STEPS)]


def dictionary(name: str, module: str, **settings: Any) -> Callable[[Callable, Path], nn.Module]:
    def trained(change: Callable, _: Path) -> nn.Module:
        trainer = getattr(dictionary_learning(f"trainers.{module}"), name)(
            steps=STEPS,
            activation_dim=D_IN,
            dict_size=D_SAE,
            layer=0,
            lm_name="none",
            device="cpu",
            warmup_steps=1,
            **settings,
        )
        trainer.dead_feature_threshold = N  # so that some are dead, where this matters
        change(trainer.ae)
        for step, x in enumerate(batches()):
            trainer.update(step, x)
        return trainer.ae

    return trained


def lens(name: str, **settings: Any) -> Callable[[Callable, Path], nn.Module]:
    def trained(change: Callable, _: Path) -> nn.Module:
        saes = sae_lens()
        training = pytest.importorskip("sae_lens.training.sae_trainer")
        config = pytest.importorskip("sae_lens.config")
        cfg = getattr(saes, f"{name}TrainingSAEConfig")(d_in=D_IN, d_sae=D_SAE, **settings)
        sae = change(getattr(saes, f"{name}TrainingSAE")(cfg))
        trainer = training.SAETrainer(
            cfg=config.SAETrainerConfig(
                total_training_samples=STEPS * N,
                train_batch_size_samples=N,
                dead_feature_window=1,
                feature_sampling_window=1000,
                n_restart_cycles=1,
                lr_end=1e-3,
                lr=1e-2,
                lr_warm_up_steps=0,
                lr_decay_steps=0,
                lr_scheduler_name="constant",
                adam_beta1=0.9,
                adam_beta2=0.999,
                device="cpu",
                autocast=False,
                logger=config.LoggingConfig(log_to_wandb=False),
                n_checkpoints=0,
                checkpoint_path=None,
                save_final_checkpoint=False,
            ),
            sae=sae,
            data_provider=iter(batches()),
        )
        return trainer.fit()

    return trained


def sparsify_trained(change: Callable, folder: Path, **settings: Any) -> nn.Module:
    library = sparsify()
    transformers = pytest.importorskip("transformers")
    datasets = pytest.importorskip("datasets")

    class Rows(transformers.PreTrainedModel):
        """Row n of a table for the token n."""

        config_class = transformers.PretrainedConfig

        def __init__(self, config: Any, table: Tensor):
            super().__init__(config)
            self.layer = nn.Embedding.from_pretrained(table)
            self.post_init()

        def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
            return self.layer(input_ids)

        def _init_weights(self, module: nn.Module) -> None:
            pass

    x = torch.cat(batches())
    model = Rows(transformers.PretrainedConfig(), x)
    data = datasets.Dataset.from_dict({"input_ids": torch.arange(len(x)).view(-1, 16).tolist()})
    data.set_format("torch")
    config = library.TrainConfig(
        library.SparseCoderConfig(num_latents=D_SAE, k=K, **settings),
        batch_size=N // 16,
        hookpoints=["layer"],
        auxk_alpha=1 / 32,
        dead_feature_threshold=N,
        log_to_wandb=False,
        save_dir=str(folder),
        optimizer="adam",
        lr=1e-2,
        lr_warmup_steps=1,
        loss_fn="fvu",
    )
    torch.manual_seed(0)
    trainer = library.Trainer(config, data, model)
    change(trainer.saes["layer"])
    trainer.fit()
    return trainer.saes["layer"]


NESTED = {"group_fractions": [0.25, 0.75]}
TRAINED: dict[str, Callable[[Callable, Path], nn.Module]] = {
    "sparsify": sparsify_trained,
    "sparsify groupmax": partial(sparsify_trained, activation="groupmax"),
    "sae_lens standard": lens("Standard"),
    "sae_lens topk": lens("TopK", k=K),
    "sae_lens abstopk": lens("AbsTopK", k=K),
    "sae_lens batchtopk": lens("BatchTopK", k=K),
    "sae_lens matryoshka": lens("MatryoshkaBatchTopK", k=K, matryoshka_widths=[8, D_SAE]),
    "sae_lens jumprelu": lens("JumpReLU"),
    "sae_lens gated": lens("Gated"),
    "dictionary_learning topk": dictionary("TopKTrainer", "top_k", k=K),
    "dictionary_learning batchtopk": dictionary("BatchTopKTrainer", "batch_top_k", k=K),
    "dictionary_learning matryoshka": dictionary(
        "MatryoshkaBatchTopKTrainer", "matryoshka_batch_top_k", k=K, **NESTED
    ),
    "dictionary_learning relu": dictionary("StandardTrainer", "standard", sparsity_warmup_steps=2),
    "dictionary_learning gated": dictionary("GatedSAETrainer", "gdm", sparsity_warmup_steps=2),
    "dictionary_learning p-annealed": dictionary(
        "PAnnealTrainer",
        "p_anneal",
        sparsity_warmup_steps=2,
        sparsity_function="Lp^p",
        anneal_start=2,
        n_sparsity_updates=2,
        p_end=0.5,
    ),
    "dictionary_learning jumprelu": dictionary(
        "JumpReluTrainer", "jumprelu", sparsity_warmup_steps=2
    ),
}


@pytest.mark.parametrize("name", TRAINED)
def test_they_train_to_the_same_weights(name, tmp_path, monkeypatch):
    """With all SAEs of the library accelerated, or none."""
    always = dense.Limits(1.0, 1.0)  # or the library's own code would run
    monkeypatch.setattr(dense.AboveThreshold, "limits", lambda *_: always)
    start: dict[str, Tensor] = {}

    def watched(module: nn.Module) -> nn.Module:
        start.update({n: p.detach().clone() for n, p in module.named_parameters()})
        return module

    def trained() -> nn.Module:
        torch.manual_seed(0)
        return TRAINED[name](watched, tmp_path)

    theirs, library = trained(), name.split()[0]
    with fastsae.accelerate(library, exact_compat=library == "sparsify"):
        ours = trained()
    assert type(ours).__name__ == f"Fast{type(theirs).__name__}"
    for key, parameter in theirs.named_parameters():
        moved = (parameter - start[key]).norm()
        assert moved > 0 or "b_enc" in key
        assert (ours.get_parameter(key) - parameter).norm() <= 1e-3 * moved + 1e-6
    assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()), rtol=1e-3, atol=1e-5)
