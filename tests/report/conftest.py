"""A tiny causal model whose vocabulary holds what a page must not take for markup, and planted
activations of it: every token has a direction, and every latent of the SAE is one of them."""

import os
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from fastsae.data import ActivationShards, ShardWriter
from fastsae.nn import SAE, TopK

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported, in the fixtures

HOSTILE = (
    "<script>window.hacked=1</script>",
    "</script><script>window.hacked=2</script>",
    '"><img src=x onerror="window.hacked=3">',
    "&lt;b&gt;&amp;",
    "'\"`${window.hacked=4}`\\",
    "{{ 7 * 7 }}{% raw %}",
    "\x00\x07\x1b[31m\x7f\x9b",
    "\u202egnirts\u202c",
    "\u2066isolate",
    "שלום",
    "مرحبا",
    "zero\u200bwidth\ufeff",
    "line\nbreak\ttab",
    "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),
)
PLAIN = tuple(f"word{i}" for i in range(18))
VOCABULARY = (*PLAIN, *HOSTILE)
WIDTH, WINDOW, TOKENS = 32, 12, 1800


class World(NamedTuple):
    """A folder of shards with their model, and an SAE of them."""

    model: Path
    data: Path
    sae: SAE

    @property
    def heldout(self) -> ActivationShards:
        return ActivationShards(self.data / "heldout")


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """Its tokenizer has one token for each text of VOCABULARY."""
    from tokenizers import Tokenizer, models
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    words = models.WordLevel({text: i for i, text in enumerate(VOCABULARY)}, unk_token=PLAIN[0])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), model_max_length=64)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    size = GPT2Config(vocab_size=len(VOCABULARY), n_positions=64, n_embd=WIDTH, n_layer=1, n_head=2)
    made = GPT2LMHeadModel(size)
    torch.nn.init.uniform_(made.transformer.ln_f.weight, 0.5, 2.0)
    torch.nn.init.uniform_(made.transformer.ln_f.bias)
    made.save_pretrained(folder)
    return folder


def write(folder: Path, directions: torch.Tensor, model: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(len(VOCABULARY), (TOKENS,), generator=generator)
    x = directions[tokens] * (1 + torch.rand(TOKENS, 1, generator=generator))
    x = x + 0.02 * torch.randn(TOKENS, WIDTH, generator=generator)
    places = torch.arange(TOKENS)
    labels = (labels.int() for labels in (tokens, places % WINDOW, places // (5 * WINDOW)))
    writer = ShardWriter(folder, WIDTH, model=str(model), hookpoint="transformer.h.0", harvest={})
    writer.append(x, *labels)
    writer.finish()


@pytest.fixture(scope="session")
def world(model, tmp_path_factory) -> World:
    data = tmp_path_factory.mktemp("world") / "data"
    torch.manual_seed(0)
    directions, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH))
    write(data / "heldout", directions, model, 1)
    write(data, directions, model, 0)
    sae = SAE(WIDTH, WIDTH + 8, TopK(2)).eval()
    with torch.no_grad():
        for weight in (sae.W_enc, sae.W_dec):
            weight[:WIDTH] = directions
    return World(model, data, sae)
