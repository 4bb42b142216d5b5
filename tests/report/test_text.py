"""Token text reads as the text does, and shows what cannot be seen."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastsae.data import ActivationArray, Contexts
from fastsae.report.text import Strings, TokenText, WordPieces, visible, windows_of


@given(st.text())
def test_what_is_shown_is_visible(text):
    assert visible(text).isprintable()
    if text.isprintable():
        assert visible(text) == text


def test_what_reverses_text_is_escaped():
    assert visible("a\u202eb\x1b\n") == "a\\u202eb\\x1b↵"


@given(st.lists(st.text(max_size=2)))
def test_each_string_is_stored_once(texts):
    strings = Strings()
    numbers = [strings.number(text) for text in texts]
    assert [strings.texts[number] for number in numbers] == texts
    assert len(set(strings.texts)) == len(strings.texts)


def tokenizer(kind: str):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    text = "the theory of unreadable things, naïve and 東京"
    if kind == "wordpiece":
        pieces = ["[UNK]", "the", "##ory", "of", "un", "##read", "##able", "things", ","]
        inner = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
        inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        inner.decoder = decoders.WordPiece()
        return PreTrainedTokenizerFast(tokenizer_object=inner), "the theory of unreadable things"
    inner = Tokenizer(models.BPE())
    byte = kind == "bytes"
    inner.pre_tokenizer = (
        pre_tokenizers.ByteLevel(add_prefix_space=False) if byte else pre_tokenizers.Metaspace()
    )
    inner.decoder = decoders.ByteLevel() if byte else decoders.Metaspace()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if byte else []
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner), "the theory of things"


@pytest.mark.parametrize("kind", ["wordpiece", "bytes", "metaspace"])
def test_tokens_in_a_row_read_as_the_text(kind, tmp_path):
    made, text = tokenizer(kind)
    made.save_pretrained(tmp_path)
    shown, read = TokenText(made), WordPieces.read(str(tmp_path))
    assert (read is not None) == (kind == "wordpiece")
    if read is not None:
        again = TokenText(read)
        assert [shown[i] for i in range(len(made))] == [again[i] for i in range(len(made))]
    assert "".join(shown[i] for i in made(text)["input_ids"]).strip() == text
    assert shown[10**6] == "#1000000 "


def test_a_part_of_a_character_is_shown_by_its_piece():
    made, _ = tokenizer("bytes")
    shown = TokenText(made)
    ids = made("é")["input_ids"]
    assert all("\ufffd" not in shown[i] for i in ids)


def test_windows_end_where_the_text_does():
    positions = torch.tensor([1, 2, 3, 1, 2, 1, 3, 4, 5])
    documents = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 2])
    tokens = torch.arange(9)
    data = ActivationArray(torch.randn(9, 2), Contexts(tokens, positions, documents))
    found = windows_of(data, torch.tensor([0, 1, 2, 3, 4, 5, 6, 8]))
    assert found is not None
    np.testing.assert_array_equal(found.tokens, [0, 1, 2, 3, 4, 5, 6, 8])
    np.testing.assert_array_equal(found.firsts, [0, 0, 0, 3, 3, 5, 5, 7])
    np.testing.assert_array_equal(found.ends, [3, 3, 3, 5, 5, 7, 7, 8])
    assert windows_of(ActivationArray(torch.randn(9, 2)), torch.arange(9)) is None
