"""Rebuilt windows are the ones the model read, except special tokens inside the text."""

import pytest
import torch

from fastsae.data.model import TextWindows, load_tokenizer
from fastsae.evals import windows
from fastsae.evals.windows import stored_batches


def rebuilt(data, max_windows=None, batch_size=3) -> list[list[int]]:
    tokenizer = load_tokenizer(data.model)
    return [
        ids[mask.bool()].tolist()
        for batch in stored_batches(data, tokenizer, max_windows, batch_size)
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
    ]


def original(data) -> list[list[int]]:
    tokenizer = load_tokenizer(data.model)
    cut = TextWindows(tokenizer, 32).cut
    folder = data.path.parent
    return [window for n in range(4) for window in cut((folder / f"{n}.txt").read_text())]


@pytest.mark.parametrize("scan", [5, 1 << 18])
def test_gpt2_windows(gpt2_data, scan, monkeypatch):
    monkeypatch.setattr(windows, "SCAN", scan)
    assert rebuilt(gpt2_data) == original(gpt2_data)  # its one special token is the stand-in


def test_bert_windows(bert_data):
    tokenizer = load_tokenizer(bert_data.model)
    special = [tokenizer.cls_token_id, tokenizer.sep_token_id]
    found, wanted = rebuilt(bert_data), original(bert_data)
    pairs = zip(sum(found, []), sum(wanted, []), strict=True)
    assert [new for new, old in pairs if new != old] == [tokenizer.unk_token_id]
    assert all([window[0], window[-1]] == special for window in found)


def test_evenly_spread(gpt2_data):
    whole = rebuilt(gpt2_data)
    n = len(whole)
    assert rebuilt(gpt2_data, 3, batch_size=2) == [whole[0], whole[n // 3], whole[2 * n // 3]]
    assert rebuilt(gpt2_data, n + 1) == whole


def test_kept_tokens_are_the_stored_ones(bert_data):
    batches = stored_batches(bert_data, load_tokenizer(bert_data.model), None, 3)
    ids = torch.cat([batch.input_ids[batch.keep] for batch in batches])
    assert ids.equal(bert_data.contexts(torch.arange(bert_data.n_tokens)).token_ids)
