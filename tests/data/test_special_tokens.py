"""Special tokens are where the tokenizer or the user wants them, in harvest and evaluation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastsae.data import ActivationShards, HarvestConfig, harvest
from fastsae.data.model import TextWindows, load_model, load_tokenizer
from fastsae.evals.windows import stored_batches

DNA = "ACGTTGCAACGGT"
SPECIAL = ["<cls>", "<eos>", "<pad>"]


@pytest.fixture(scope="session")
def dna(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal model of letters; its tokenizer puts <cls> first and has no unknown token."""
    folder = tmp_path_factory.mktemp("dna")
    tokenizer = Tokenizer(models.BPE({s: i for i, s in enumerate([*SPECIAL, *"ACGT"])}, []))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<cls> $A <eos>", special_tokens=[("<cls>", 0), ("<eos>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<cls>", eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    size = LlamaConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(size).save_pretrained(folder)
    return folder


def harvested(model: Path, tmp_path: Path, **settings: Any) -> ActivationShards:
    (tmp_path / "text.txt").write_text(DNA)
    config = HarvestConfig(
        model=str(model),
        hookpoint="model.layers.0",
        out=tmp_path / "out",
        text=(str(tmp_path / "text.txt"),),
        context_length=8,
        heldout_fraction=0.0,
        **settings,
    )
    return harvest(config, progress=False)


def test_special_tokens_surround_the_text_of_any_alphabet(dna: Path):
    tokenizer = load_tokenizer(str(dna))
    windows = TextWindows(tokenizer, 32)
    assert windows.cut(DNA) == [tokenizer(DNA)["input_ids"]]
    assert (windows.prefix, windows.suffix) == ([0], [1])


@pytest.mark.parametrize(("prepend_bos", "start"), [("auto", [0]), ("yes", [0]), ("no", [])])
@pytest.mark.parametrize("drop_first", [False, True])
def test_evaluation_reads_the_windows_that_were_harvested(
    dna: Path, tmp_path: Path, prepend_bos: Any, start: list[int], drop_first: bool
):
    """A text token in the first position is not stored if it is dropped; a special one replaces
    it, in the same place."""
    shards = harvested(dna, tmp_path, prepend_bos=prepend_bos, drop_first=drop_first)
    tokenizer = load_tokenizer(str(dna))
    ids = tokenizer(DNA, add_special_tokens=False)["input_ids"]
    size = 8 - len(start) - 1
    windows = [[*start, *ids[i : i + size], 1] for i in range(0, len(ids), size)]
    unstored = drop_first and not start
    if unstored:
        windows = [[0, *window[1:]] for window in windows]
    (batch,) = stored_batches(shards, tokenizer, None, 9)
    found = zip(batch.input_ids, batch.attention_mask, strict=True)
    assert [ids[mask.bool()].tolist() for ids, mask in found] == windows
    assert shards.n_tokens == len(ids) - unstored * len(windows)
    rows = torch.arange(shards.n_tokens)
    model = load_model(str(dna))
    if not unstored:
        hidden = model(
            batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True
        ).hidden_states[1]
        torch.testing.assert_close(shards.rows(rows), hidden[batch.keep])
    assert torch.equal(shards.contexts(rows).token_ids, batch.input_ids[batch.keep])


def test_dropping_the_first_position_drops_nothing_else(dna: Path, tmp_path: Path):
    whole = harvested(dna, tmp_path, prepend_bos="no")
    (tmp_path / "dropped").mkdir()
    dropped = harvested(dna, tmp_path / "dropped", prepend_bos="no", drop_first=True)
    rows = torch.arange(whole.n_tokens)
    later = whole.contexts(rows).positions > 0
    assert torch.equal(dropped.rows(torch.arange(dropped.n_tokens)), whole.rows(rows)[later])


def test_a_tokenizer_without_bos_cannot_prepend_it(bert: Path):
    with pytest.raises(ValueError, match="tokenizer has no BOS token"):
        TextWindows(load_tokenizer(str(bert)), 16, prepend_bos="yes")
