"""The text of tokens, and the windows of text that activations are from."""

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
from jaxtyping import Int64
from torch import Tensor

from fastsae.data import StoredActivations
from fastsae.data.model import ModelFiles, load_tokenizer
from fastsae.data.source import TextActivations
from fastsae.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKS = {"\n": "↵", "\t": "⇥", "\r": "␍"}
WORD_START = "▁"
"""How SentencePiece writes the space before a word, which decoding a single token drops."""


def plain(text: str) -> str:
    """Text as it is, but with control characters except line breaks and tabs escaped, and halves
    of surrogate pairs, which are not valid UTF-8."""
    return "".join(
        c.encode("unicode_escape").decode()
        if c not in MARKS and unicodedata.category(c) in ("Cc", "Cs")
        else c
        for c in text
    )


def visible(text: str) -> str:
    """Text with line breaks and tabs as signs, and control and invisible characters escaped: also
    those that reverse the direction of what is around them."""
    return "".join(
        c if c.isprintable() else MARKS.get(c) or c.encode("unicode_escape").decode() for c in text
    )


@dataclass
class Strings:
    """Texts that are used again and again, each stored once and known by its number."""

    texts: list[str] = field(default_factory=list)
    _numbers: dict[str, int] = field(default_factory=dict)

    def number(self, text: str) -> int:
        found = self._numbers.setdefault(text, len(self.texts))
        if found == len(self.texts):
            self.texts.append(text)
        return found


class WordPieces:
    """The tokens of a WordPiece vocabulary by their ids: all that showing them needs."""

    def __init__(self, tokens: dict[int, str]):
        self.convert_ids_to_tokens = tokens.get

    @classmethod
    def read(cls, model: str) -> "WordPieces | None":
        """From a model's folder, without transformers, which takes seconds to import; None for
        any other tokenizer."""
        try:
            values = read_json(Path(model) / "tokenizer.json")
            if {values["model"]["type"], values["decoder"]["type"]} != {"WordPiece"}:
                return None
            tokens = {int(number): str(token) for token, number in values["model"]["vocab"].items()}
            added = {int(one["id"]): str(one["content"]) for one in values["added_tokens"]}
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
        return cls(tokens | added)


class TokenText:
    """The text of token ids, as `show` shows it; without a tokenizer, their numbers."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase | WordPieces | None",
        show: Callable[[str], str] = visible,
    ):
        self._tokenizer: Any = tokenizer
        self._show = show
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        decoder = type(getattr(backend, "decoder", None)).__name__
        self._wordpiece = isinstance(tokenizer, WordPieces) or decoder == "WordPiece"
        self._known: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = self._show(self._text(token))
        return self._known[token]

    def shown_as(self, show: Callable[[str], str]) -> "TokenText":
        """The same text, shown in another way."""
        return TokenText(self._tokenizer, show)

    def _text(self, token: int) -> str:
        if self._tokenizer is None:
            return f"#{token} "
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # padding of the embedding matrix
            return f"#{token} "
        if self._wordpiece:
            return piece[2:] if piece.startswith("##") else f" {piece}"
        text = str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False))
        if not text or "\ufffd" in text:  # a part of a character
            return piece
        spaced = piece.startswith(WORD_START) and not text.startswith(" ")
        return f" {text}" if spaced else text


@dataclass(frozen=True, kw_only=True)
class Windows:
    """The tokens of some rows, and the windows of text that the model saw them in."""

    tokens: Int64[np.ndarray, " N"]
    """Token ids."""

    firsts: Int64[np.ndarray, " N"]
    """For each row, the place of the first row of its window."""

    ends: Int64[np.ndarray, " N"]
    """For each row, the place after the last row of its window."""

    @classmethod
    def of(cls, data: TextActivations, rows: Int64[Tensor, " N"]) -> "Windows":
        """A window ends where the document changes, the position decreases or rows are left out."""
        tokens, positions, documents = (part.numpy() for part in data.contexts(rows))
        begins = (np.diff(positions) <= 0) | (np.diff(documents) != 0)
        begins |= np.diff(rows.numpy()) != 1
        starts = np.concatenate([[0], 1 + np.flatnonzero(begins)])
        lengths = np.diff(np.concatenate([starts, [len(tokens)]]))
        firsts = np.repeat(starts, lengths)
        return cls(tokens=tokens, firsts=firsts, ends=firsts + np.repeat(lengths, lengths))

    @cached_property
    def occurrences(self) -> Int64[np.ndarray, " V"]:
        """How often each token occurs."""
        return np.bincount(self.tokens)


def windows_of(data: StoredActivations, rows: Int64[Tensor, " N"]) -> Windows | None:
    """The windows of text of some rows; None if their tokens are unknown."""
    return Windows.of(data, rows) if has_text(data) else None


def has_text(data: StoredActivations) -> TypeGuard[TextActivations]:
    """Whether it is known which tokens the rows are of."""
    return isinstance(data, TextActivations) and data.has_contexts


def token_text(data: StoredActivations, trust_remote_code: bool) -> tuple[TokenText, str | None]:
    """The text of the data's tokens, and why there is none if there is no tokenizer."""
    model = getattr(data, "model", None)
    if model is None:
        return TokenText(None), "the data names no model whose tokenizer could decode them"
    files = ModelFiles.of(getattr(data, "harvest", {}), trust_remote_code)
    try:
        return TokenText(WordPieces.read(model) or load_tokenizer(model, files)), None
    except ValueError as error:
        return TokenText(None), str(error)
