"""Windows of text, rebuilt from the tokens of stored rows."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int64

from fastsae.data.model import TextWindows, TokenBatch
from fastsae.data.source import TextActivations

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCAN = 1 << 18  # rows whose contexts are held at a time


def stored_batches(
    data: TextActivations,
    tokenizer: "PreTrainedTokenizerBase",
    max_windows: int | None,
    batch_size: int,
) -> Iterator[TokenBatch]:
    """Batches of `max_windows` windows spread evenly over the data, or of all windows.

    Shards only store text tokens. The special tokens around each window are restored; one inside
    the text is lost and replaced by the unknown token, or else by another special token.
    """
    text = TextWindows(
        tokenizer,
        tokenizer.model_max_length,
        prepend_bos=data.harvest.get("prepend_bos", "auto"),
        drop_first=data.harvest.get("drop_first", False),
    )
    before, after = text.prefix, text.suffix
    unknown: Any = tokenizer.unk_token_id
    stand_in = min(text.special, default=0) if unknown is None else unknown

    def window(start: int, stop: int) -> list[int]:
        token_ids, positions, _ = data.contexts(torch.arange(start, stop))
        ids = before + [stand_in] * (int(positions[-1]) + 1 - len(before))
        for place, token in zip(positions.tolist(), token_ids.tolist(), strict=True):
            ids[place] = token
        return ids + after

    bounds = [*_starts(data).tolist(), data.n_tokens]
    n = len(bounds) - 1
    wanted = n if max_windows is None else min(max_windows, n)
    for first in range(0, wanted, batch_size):
        chosen = [i * n // wanted for i in range(first, min(first + batch_size, wanted))]
        yield text.batch([window(*bounds[i : i + 2]) for i in chosen])


def _starts(data: TextActivations) -> Int64[np.ndarray, " windows"]:
    """The rows at which windows start: where the document changes or the position decreases."""
    starts = [np.zeros(1, np.int64)]
    for first in range(1, data.n_tokens, SCAN):
        rows = torch.arange(first - 1, min(first + SCAN, data.n_tokens))
        _, positions, documents = (label.numpy() for label in data.contexts(rows))
        begins = (np.diff(positions) <= 0) | (np.diff(documents) != 0)
        starts.append(first + np.flatnonzero(begins))
    return np.concatenate(starts)
