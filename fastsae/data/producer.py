"""Produces activations: runs a model over text and takes the outputs, or inputs, of its modules."""

import hashlib
import threading
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from functools import cached_property
from itertools import accumulate, islice
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fastsae.data.dealt import read_alike, run_dealt
from fastsae.data.hookpoints import hidden_at, hookpoints_at
from fastsae.data.model import PrependBos, TextWindows, TokenBatch
from fastsae.data.source import Contexts
from fastsae.data.text import Document
from fastsae.shards import ONE_PROCESS, Channel, Shards

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GROUP_BATCHES = 4  # batches whose windows are sorted by length together
HELDOUT_WINDOWS = 256  # longer documents are held out in runs of this many windows
SEARCHED_WINDOWS = 100_000  # the most in which held-out ones are searched for
FIRST_WINDOWS = 4096

Place = tuple[int, ...]
"""Where a producer continues; () is its beginning."""

Part = Literal["train", "heldout", "both"]


class Group(NamedTuple):
    """Rows that were produced together."""

    rows: tuple[Float[Tensor, "N _"], ...]
    """For each hookpoint, in the order of `Producer.widths`."""

    contexts: Contexts | None
    """Where the rows come from, if it is known."""

    next: Place
    """Where the producer continues after them."""

    heldout: bool = False
    """Whether the rows are set aside for evaluation."""

    finite: bool = False
    """Whether the producer has looked for NaN and Inf; otherwise the stream does."""


@runtime_checkable
class Producer(Protocol):
    """Makes the rows of a `Stream`, at one or more hookpoints of a model.

    To feed a stream from another library, write a class with these three members.
    """

    @property
    def widths(self) -> dict[str, int]:
        """Width of the rows at each hookpoint, by its name."""
        ...

    @property
    def fingerprint(self) -> str:
        """A short hash of what determines the rows, apart from the hookpoints; a run resumes only
        with the same."""
        ...

    def groups(self, start: Place = (), part: Part = "train") -> Iterator[Group]:
        """The groups of a part from a place on, up to the end of the data: the same groups for the
        same place, or a run cannot be resumed exactly."""
        ...


_LOCKS: MutableMapping[nn.Module, threading.Lock] = weakref.WeakKeyDictionary()
"""One for each model: its hooks see what other threads run."""


class NotFinite(ValueError):
    """A model gave NaN or Inf."""


class _Window(NamedTuple):
    ids: list[int]
    document: int
    number: int
    """Among those of its document."""


class ModelProducer:
    """Runs a Hugging Face model over documents, each cut into windows of tokens.

    Padding and special tokens are no rows. Documents, or parts of long ones, are held out by a hash
    of their content, so that duplicates are held out together.

    Args:
        model: a transformers model; it stays on its device.
        tokenizer: its tokenizer.
        documents: texts, or lists of token ids, that can be read more than once; or a function that
            returns an iterator over pairs of a number and a document, from a number on.
        hookpoints: paths of modules, with `:in` for a module's input.
        context_length: tokens per window, special tokens included.
        prepend_bos: whether windows begin with the BOS token; auto is what the tokenizer does.
        drop_first: whether the first position of each window is no row.
        max_document_tokens: use only the first ones of each document.
        heldout_fraction: of the documents.
        dtype: of the rows; None for the one that the model gives.
        batch_tokens: per forward pass, including padding.
        fingerprint: a short hash of model and documents; by default of the settings here and the
            names of model and tokenizer, which do not tell other documents apart.

    Raises ValueError for unknown hookpoints and those without a row for each token.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        documents: "Iterable[Document] | Callable[[int], Iterator[tuple[int, Document]]]",
        hookpoints: Iterable[str],
        *,
        context_length: int = 128,
        prepend_bos: PrependBos = "auto",
        drop_first: bool = False,
        max_document_tokens: int | None = None,
        heldout_fraction: float = 0.05,
        dtype: torch.dtype | None = None,
        batch_tokens: int = 8192,
        fingerprint: str | None = None,
    ):
        names = [*hookpoints]
        self.model = model
        self.hookpoints = dict(zip(names, hookpoints_at(model, names), strict=True))
        self.widths = {name: hook.width for name, hook in self.hookpoints.items()}
        self._documents = documents if callable(documents) else _numbered(documents)
        self._windows = TextWindows(
            tokenizer, context_length, model, prepend_bos=prepend_bos, drop_first=drop_first
        )
        self._max_document_tokens, self._heldout_fraction = max_document_tokens, heldout_fraction
        self._batch_tokens, self._dtype = batch_tokens, dtype
        self.group_tokens = GROUP_BATCHES * batch_tokens
        """Tokens in the windows of a group, which are sorted by length."""
        self.lock = _LOCKS.setdefault(model, threading.Lock())
        """Held while the model runs: its hooks see what other threads run."""
        about = (model.name_or_path, tokenizer.name_or_path, context_length, prepend_bos)
        about += (drop_first, max_document_tokens, heldout_fraction, str(dtype), batch_tokens)
        self.fingerprint = fingerprint or _digest(repr(about).encode()).hex()[:16]
        self.channels: dict[Part, Channel] = {}
        self._shards = ONE_PROCESS

    @property
    def begins_with_bos(self) -> bool:
        """Whether every window begins with the BOS token."""
        return self._windows.begins_with_bos

    def divide(self, shards: Shards) -> None:
        """Run a part of each group's windows in each of the processes, which all get all rows. From
        then on, all must take the same groups in the same order, of each part in one thread. Those
        that do already make no other channels. One process runs all windows again."""
        if self._shards is not shards:
            self._shards = shards
            self.channels = {"train": shards.channel(), "heldout": shards.channel()}

    def channel(self, part: Part) -> Channel:
        """How the processes that take the groups of a part talk to each other."""
        return self.channels.get(part) or Channel()

    @property
    def skipped_rows(self) -> int:
        """Rows of the text without a value, as far as it was read."""
        return getattr(self._documents, "skipped", 0)

    def groups(
        self, start: Place = (), part: Part = "train", max_tokens: int | None = None
    ) -> Iterator[Group]:
        """See `Producer`. It ends early once there are `max_tokens` rows for training. After the
        last group of finite rows, NotFinite names the document that has others."""
        cut = self._groups(start, part, max_tokens)
        while (found := read_alike(lambda: next(cut, None), self.channel(part))) is not None:
            windows, place, heldout = found
            rows, ends = self._run_together(windows, self.channel(part))
            finite = torch.stack([x.isfinite().all(1) for x in rows])
            whole = len(windows)
            if not finite.all():
                whole = bisect_right(ends, int(finite.all(0).byte().argmin()))
            if whole:
                kept, contexts = ends[whole - 1], self._contexts(windows[:whole])
                parts = tuple(x[:kept] for x in rows)
                yield Group(parts, contexts, place, heldout, finite=True)
                del parts
            if whole < len(windows):
                first = slice(ends[whole - 1] if whole else 0, ends[whole])
                by_name = zip(self.widths, finite[:, first], strict=True)
                name = next(name for name, rows_finite in by_name if not rows_finite.all())
                raise NotFinite(f"{name} holds NaN or Inf in document {windows[whole].document}")
            del rows  # its memory is free while the next group is made

    @cached_property
    def first_windows(self) -> list[list[int]]:
        """The token ids of the first 4096 windows for training in which a token has a predecessor
        to be predicted from. This tokenizes their text, but does not run the model."""
        train = (window.ids for window, heldout in self._cut(()) if not heldout)
        return [*islice((ids for ids in train if any(self._windows.rows(ids))), FIRST_WINDOWS)]

    def batch(self, windows: Sequence[list[int]]) -> TokenBatch:
        """Windows of token ids as the model reads them."""
        return self._windows.batch([*windows])

    def _groups(
        self, start: Place, part: Part, max_tokens: int | None
    ) -> Iterator[tuple[list[_Window], Place, bool]]:
        """Groups of windows of consecutive documents, the place after each, and whether they are
        held out."""
        groups: dict[bool, list[_Window]] = {False: [], True: []}
        sizes, taken = {False: 0, True: 0}, 0
        windows = self._cut(start)
        if part == "heldout":
            windows = islice(windows, SEARCHED_WINDOWS if self._heldout_fraction else 0)
        for window, heldout in windows:
            if part not in ("both", "heldout" if heldout else "train"):
                continue
            groups[heldout].append(window)
            sizes[heldout] += len(window.ids)
            taken += 0 if heldout else len(self._windows.rows(window.ids))
            if max_tokens is not None and taken >= max_tokens:
                break
            if sizes[heldout] >= self.group_tokens:
                yield groups[heldout], (window.document, window.number + 1), heldout
                groups[heldout], sizes[heldout] = [], 0
        for heldout, group in groups.items():
            if group:
                yield group, (group[-1].document, group[-1].number + 1), heldout

    def _cut(self, start: Place) -> Iterator[tuple[_Window, bool]]:
        """The windows of all documents, and whether they are held out."""
        first, skip = start or (0, 0)
        for document, content in self._documents(first):
            digest = _digest(str(content).encode("utf-8", "replace"))
            for number, ids in enumerate(self._windows.cut(content, self._max_document_tokens)):
                if (document, number) < (first, skip):
                    continue
                run = number // HELDOUT_WINDOWS
                heldout = _draw(digest, run) < self._heldout_fraction and (document, run) != (0, 0)
                yield _Window(ids, document, number), heldout

    def _run_together(
        self, group: list[_Window], channel: Channel
    ) -> tuple[list[Float[Tensor, "N _"]], list[int]]:
        """The windows' rows at each hookpoint, and where those of each window end."""
        ends = [*accumulate(len(self._windows.rows(window.ids)) for window in group)]
        longest_first = sorted(range(len(group)), key=lambda i: -len(group[i].ids))
        dealt = [longest_first[rank :: channel.size] for rank in range(channel.size)]
        own = dealt[channel.rank] or longest_first[:1]  # even so, to know the rows' dtype
        return run_dealt(lambda: self._run(group, own, ends), ends, dealt, channel), ends

    def _run(
        self, group: list[_Window], left: list[int], ends: list[int]
    ) -> list[Float[Tensor, "N _"]]:
        """The rows at each hookpoint, with those of some of the windows, longest first to save
        padding."""
        rows: list[Tensor] = []
        while left:
            fit = self._batch_tokens // len(group[left[0]].ids)
            members, left = left[:fit], left[fit:]
            batch = self._windows.batch([group[i].ids for i in members])
            with self.lock:
                found = hidden_at(self.model, [*self.hookpoints.values()], batch)
            found = [hidden.to("cpu", self._dtype or hidden.dtype) for hidden in found]
            rows = rows or [hidden.new_empty(ends[-1], hidden.shape[2]) for hidden in found]
            for place, i in enumerate(members):
                part = slice(ends[i - 1] if i else 0, ends[i])
                for whole, hidden in zip(rows, found, strict=True):
                    whole[part] = hidden[place][batch.keep[place]]
        return rows

    def _contexts(self, group: list[_Window]) -> Contexts:
        labels = [
            (window.ids[place], place, window.document)
            for window in group
            for place in self._windows.rows(window.ids)
        ]
        return Contexts(*torch.tensor(labels, dtype=torch.int64).view(-1, 3).unbind(1))


def _numbered(documents: Iterable[Document]) -> Callable[[int], Iterator[tuple[int, Document]]]:
    if isinstance(documents, Iterator):
        raise ValueError(
            "documents must be readable more than once, such as a list: got an iterator"
        )
    return lambda start: islice(enumerate(documents), start, None)


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _draw(digest: bytes, part: int) -> float:
    """A number in [0, 1) that depends only on the text."""
    drawn = _digest(digest + part.to_bytes(8, "little"))
    return int.from_bytes(drawn[:6], "little") / 2**48
