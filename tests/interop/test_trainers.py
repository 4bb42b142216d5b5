"""A few steps of the libraries' own trainers, with accelerated modules and as they were."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import fastsae
from fastsae.dropin.dense import MIN_TOKENS

from .peers import D_IN, D_SAE, K, dictionary_learning, sae_lens, sparsify

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries

STEPS, N = 5, 2 * MIN_TOKENS  # enough tokens to exercise the fast path


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(N, D_IN, generator=generator) for _ in range(STEPS)]


def dictionary_trained(name: str, module: str, change: Callable, **settings: Any) -> nn.Module:
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
    trainer.dead_feature_threshold = N  # so that some are dead
    change(trainer.ae)
    for step, x in enumerate(batches()):
        trainer.update(step, x)
    return trainer.ae


def lens_trained(name: str, change: Callable, **settings: Any) -> nn.Module:
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


TRAINED: dict[str, Callable[[Callable, Path], nn.Module]] = {
    "sparsify": sparsify_trained,
    "sae_lens topk": lambda change, _: lens_trained("TopK", change, k=K),
    "sae_lens batchtopk": lambda change, _: lens_trained("BatchTopK", change, k=K),
    "sae_lens jumprelu": lambda change, _: lens_trained("JumpReLU", change),
    "dictionary_learning topk": lambda change, _: dictionary_trained(
        "TopKTrainer", "top_k", change, k=K
    ),
    "dictionary_learning batchtopk": lambda change, _: dictionary_trained(
        "BatchTopKTrainer", "batch_top_k", change, k=K
    ),
    "dictionary_learning jumprelu": lambda change, _: dictionary_trained(
        "JumpReluTrainer", "jumprelu", change, sparsity_warmup_steps=2
    ),
}


@pytest.mark.parametrize("name", TRAINED)
def test_they_train_to_the_same_weights(name, tmp_path):
    def exact(module: nn.Module) -> nn.Module:
        compat = {"exact_compat": True} if name == "sparsify" else {}
        return fastsae.accelerate(module, **compat)

    start: dict[str, Tensor] = {}

    def watched(module: nn.Module) -> nn.Module:
        start.update({n: p.detach().clone() for n, p in module.named_parameters()})
        return module

    found = []
    for n, change in enumerate((watched, exact)):
        torch.manual_seed(0)
        found.append(TRAINED[name](change, tmp_path / str(n)))
    theirs, ours = found
    assert type(ours).__name__ == f"Fast{type(theirs).__name__}"
    for key, parameter in theirs.named_parameters():
        moved = (parameter - start[key]).norm()
        assert moved > 0 or "b_enc" in key
        assert (ours.get_parameter(key) - parameter).norm() <= 1e-3 * moved + 1e-6
    assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()), rtol=1e-3, atol=1e-5)
