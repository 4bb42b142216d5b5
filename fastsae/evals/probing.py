"""Sparse probing: how well a few latents predict properties of tokens (arXiv:2305.01610).

For each binary label, a logistic regression on the k latents that differ most between its classes
is trained, and tested on other tokens with balanced classes. The baseline uses k coordinates of the
activation instead.
"""

import keyword
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor
from torch.nn.functional import softplus

from fastsae.codes import Codes
from fastsae.data.model import ModelFiles, load_tokenizer
from fastsae.data.prefetch import checked
from fastsae.data.source import StoredActivations, TextActivations
from fastsae.nn.sae import SAE

from .reconstruction import evaluation_mode

RUN = 256  # consecutive rows taken together, to read few places of the data
LEAST, MOST = 30, 2500  # tokens of each class for training, and again for testing
CHUNK_ENTRIES = 1 << 22  # entries of dense codes that exist at a time
RIDGE = 1e-3
NEWTON_STEPS = 20
KEYWORDS = {word.lower() for word in keyword.kwlist}  # many tokenizers lowercase text
BRACKETS = set("()[]{}=_")
NEAR = 8  # tokens on each side

Labels = Mapping[str, Bool[Tensor, " n_tokens"]]
Features = Callable[[int], Float[Tensor, "_ F"]]  # of a chunk, by its number


@dataclass(frozen=True, kw_only=True)
class Probing:
    """How well labels of tokens can be predicted from a few latents."""

    tokens: int
    """Tokens used: three quarters for training, one quarter for testing."""

    accuracy: dict[str, float]
    """By k: test accuracy from k latents, averaged over labels."""

    baseline: dict[str, float]
    """By k: the same from k coordinates of the activation."""

    label_accuracy: dict[str, dict[str, float]]
    """By label and k: test accuracy from k latents; chance is 0.5."""

    label_baseline: dict[str, dict[str, float]]
    """By label and k: the same from k coordinates of the activation."""

    label_latents: dict[str, list[int]]
    """By label: the selected latents, best first."""

    label_tokens: dict[str, int]
    """By label: the number of test tokens, balanced between classes."""


@torch.no_grad()
def sparse_probing(
    sae: SAE,
    data: StoredActivations,
    *,
    labels: Labels | None = None,
    ks: Sequence[int] = (1, 5),
    max_tokens: int = 20_000,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> Probing:
    """Train and test sparse probes on about `max_tokens` rows of data.

    Args:
        sae: an autoencoder or transcoder, moved to `device` if that is given.
        data: rows are taken in runs spread evenly over it: three quarters train, the rest tests.
        labels: by name, a boolean per row of data. By default labels are derived from the text that
            data was harvested from (see `text_labels`), without those that are too rare.
        ks: numbers of latents per probe.
        seed: the same seed gives the same result.

    ValueError for data of another width or with NaN or Inf, k below 1 or above d_in or d_sae,
    labels that are too rare or not one per row, and data with neither text nor labels.
    """
    if data.d_in != sae.d_in:
        raise ValueError(f"the SAE has d_in = {sae.d_in}, the data has rows of {data.d_in}")
    most = min(sae.d_in, sae.d_sae)
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    if not ks or not 1 <= min(ks) <= max(ks) <= most:
        raise ValueError(f"ks must be from 1 to {most}, the smaller of d_in and d_sae, got {ks}")
    rows = _spread(data.n_tokens, max_tokens)
    splits = _splits(data, rows, labels, seed)
    sae = sae.to(device or sae.b_dec.device)
    x = data.rows(rows)
    checked(x.numpy(), rows.numpy(), data.where)
    chunks = x.split(max(1, CHUNK_ENTRIES // sae.d_sae))
    with evaluation_mode(sae):
        latents, accuracy = _probed(_latents(sae, chunks), len(chunks), splits, ks)
    _, baseline = _probed(chunks.__getitem__, len(chunks), splits, ks)
    return Probing(
        tokens=len(x),
        accuracy={str(k): fmean(found[str(k)] for found in accuracy.values()) for k in ks},
        baseline={str(k): fmean(found[str(k)] for found in baseline.values()) for k in ks},
        label_accuracy=accuracy,
        label_baseline=baseline,
        label_latents=latents,
        label_tokens={name: len(split.test) for name, split in splits.items()},
    )


def _spread(n: int, wanted: int) -> Int64[Tensor, " N"]:
    """Increasing row numbers: evenly spread runs of consecutive rows, or all rows."""
    if wanted >= n:
        return torch.arange(n)
    run = min(RUN, wanted)
    runs = wanted // run
    starts = torch.arange(runs) * (n - run) // max(runs - 1, 1)
    return (starts[:, None] + torch.arange(run)).flatten().unique()


def text_labels(
    data: StoredActivations, rows: Int64[Tensor, " N"]
) -> dict[str, Bool[Tensor, " N"]]:
    """Labels of tokens of source code, derived from the tokens themselves.

    Of the token: `keyword` (of Python), `number`, `punctuation`; `attribute`, a word after a dot;
    `defined`, a word after def, class or import; `called`, a word before an opening parenthesis
    that is not a keyword. Of its context: `prose`, no bracket, = or _ within 8 tokens on each side,
    as in most comments and docstrings but little code; `late`, in the second half of the longest
    window. ValueError if the data's text is unknown.
    """
    text = _Text(data, rows)
    word = text.has(str.isalnum)
    is_keyword = text.has(KEYWORDS.__contains__)
    around = [place for place in range(-NEAR, NEAR + 1) if place]
    near = [text.has(lambda piece: not BRACKETS.isdisjoint(piece), place) for place in around]
    return {
        "keyword": is_keyword,
        "number": text.has(str.isdecimal),
        "punctuation": text.has(lambda piece: not any(map(str.isalnum, piece))),
        "attribute": word & text.has(".".__eq__, -1),
        "defined": word & text.has({"def", "class", "import"}.__contains__, -1),
        "called": word & ~is_keyword & text.has("(".__eq__, 1),
        "prose": ~torch.stack(near).any(0),
        "late": text.positions > text.positions.max() / 2,
    }


class _Text:
    """The text of rows, and of their neighbors in the same window."""

    def __init__(self, data: StoredActivations, rows: Int64[Tensor, " N"]):
        if not isinstance(data, TextActivations) or data.model is None:
            raise ValueError("the text of the data is unknown: pass labels")
        self.data, self.rows = data, rows
        self.tokenizer = load_tokenizer(data.model, ModelFiles.of(data.harvest))
        _, self.positions, self.documents = data.contexts(rows)
        self.pieces: dict[int, str] = {}

    def has(self, test: Callable[[str], bool], offset: int = 0) -> Bool[Tensor, " N"]:
        """Whether the token at this offset exists in the same window and satisfies the test."""
        rows = (self.rows + offset).clamp(0, self.data.n_tokens - 1)
        token_ids, positions, documents = self.data.contexts(rows)
        there = (positions == self.positions + offset) & (documents == self.documents)
        unique, places = token_ids.unique(return_inverse=True)
        holds = torch.tensor([test(self.piece(token)) for token in unique.tolist()])
        return holds[places] & there

    def piece(self, token: int) -> str:
        """A token's text, without a leading space or continuation mark."""
        if token not in self.pieces:
            text = str(self.tokenizer.decode([token])).strip().lower()
            self.pieces[token] = text[2:] if text.startswith("##") and len(text) > 2 else text
        return self.pieces[token]


class _Split(NamedTuple):
    """Indices of training and test tokens, each balanced between classes."""

    train: Int64[Tensor, " train"]
    test: Int64[Tensor, " test"]
    label: Bool[Tensor, " N"]


def _splits(
    data: StoredActivations, rows: Int64[Tensor, " N"], labels: Labels | None, seed: int
) -> dict[str, _Split]:
    for name, label in (labels or {}).items():
        if label.shape != (data.n_tokens,):
            raise ValueError(
                f"label {name!r} must have an entry for each of the {data.n_tokens} rows, "
                f"got shape {list(label.shape)}"
            )
    found = text_labels(data, rows) if labels is None else {n: y[rows] for n, y in labels.items()}
    splits = {name: split for name, y in found.items() if (split := _split(y, seed))}
    if not splits or (labels and len(splits) < len(labels)):
        rare = ", ".join(found.keys() - splits.keys()) or "no labels were given"
        raise ValueError(
            f"a label needs {LEAST} tokens of each class among the first three quarters of the "
            f"{len(rows)}, and among the rest; too rare: {rare}"
        )
    return splits


def _split(label: Bool[Tensor, " N"], seed: int) -> _Split | None:
    """None if a class is too rare."""
    generator = torch.Generator().manual_seed(seed)
    parts: list[Tensor] = []
    for places in torch.arange(len(label)).split([(cut := len(label) * 3 // 4), len(label) - cut]):
        classes = [places[label[places] == value] for value in (False, True)]
        size = min(MOST, *map(len, classes))
        if size < LEAST:
            return None
        drawn = [c[torch.randperm(len(c), generator=generator)[:size]] for c in classes]
        parts.append(torch.cat(drawn).sort().values)
    return _Split(parts[0], parts[1], label)


def _latents(sae: SAE, chunks: Sequence[Float[Tensor, "_ d_in"]]) -> Features:
    """The codes of a chunk, with all latents written out."""
    kept: dict[int, Codes] = {}

    def dense(number: int) -> Float[Tensor, "_ d_sae"]:
        codes = kept.get(number) or sae.encode(chunks[number].to(sae.b_dec))
        if codes.values.shape[1] < codes.d_sae / 8:  # else recomputing costs less memory
            kept[number] = codes
        return codes.to_dense()

    return dense


def _probed(
    features: Features, count: int, splits: Mapping[str, _Split], ks: Sequence[int]
) -> tuple[dict[str, list[int]], dict[str, dict[str, float]]]:
    """The features selected for each label, best first, and the test accuracy by k."""
    contrasts = _contrasts(features, count, list(splits.values()))
    chosen = contrasts.sort(dim=1, descending=True, stable=True).indices[:, : max(ks)].cpu()
    columns, places = chosen.unique(return_inverse=True)
    values = torch.cat([features(number)[:, columns].double().cpu() for number in range(count)])
    accuracy = {
        name: {str(k): _accuracy(values[:, place[:k]], split) for k in ks}
        for (name, split), place in zip(splits.items(), places, strict=True)
    }
    return dict(zip(splits, chosen.tolist(), strict=True)), accuracy


def _contrasts(features: Features, count: int, splits: list[_Split]) -> Float64[Tensor, "L F"]:
    """For each label and feature, the distance of the class means over the feature's standard
    deviation, on training tokens; 0 for constant features."""
    member = torch.zeros(2, len(splits), len(splits[0].label), dtype=torch.float64)
    for number, split in enumerate(splits):
        member[split.label[split.train].long(), number, split.train] = 2 / len(split.train)
    moments, start = [], 0
    for number in range(count):
        values = features(number).double()
        weight = member[..., start : start + len(values)].to(values.device)
        moments.append(torch.stack([weight @ values, weight @ values.square()]))
        start += len(values)
    means, squares = torch.stack(moments).sum(0)
    square = squares.mean(0)
    variance = (square - means.mean(0).square()).clamp_min(0)
    contrast = (means[1] - means[0]).abs() / variance.sqrt()
    return torch.where(variance > 1e-12 * square, contrast, 0.0)


def _accuracy(values: Float64[Tensor, "N k"], split: _Split) -> float:
    train, test = values[split.train], values[split.test]
    mean, std = train.mean(0), train.std(0, correction=0)
    std = torch.where(std > 0, std, 1.0)
    train, test = (
        torch.cat([(part - mean) / std, torch.ones_like(part[:, :1])], 1) for part in (train, test)
    )
    weights = _logistic(train, 2.0 * split.label[split.train] - 1)
    return float(((test @ weights > 0) == split.label[split.test]).double().mean())


def _logistic(x: Float64[Tensor, "M W"], sign: Float[Tensor, " M"]) -> Float64[Tensor, " W"]:
    """argmin_w mean(softplus(-sign (x w))) + RIDGE |w|^2 / 2, by Newton's method, halving steps."""

    def loss(w: Tensor) -> Tensor:
        return softplus(-sign * (x @ w)).mean() + RIDGE / 2 * w.square().sum()

    w = x.new_zeros(x.shape[1])
    for _ in range(NEWTON_STEPS):
        wrong = torch.sigmoid(-sign * (x @ w))
        gradient = RIDGE * w - x.T @ (sign * wrong) / len(x)
        curvature = (x.T * (wrong * (1 - wrong))) @ x / len(x) + RIDGE * torch.eye(len(w)).to(x)
        step = torch.linalg.solve(curvature, gradient)
        if step.norm() < 1e-4:
            break
        while loss(w - step) > loss(w):
            step = step / 2
        w = w - step
    return w
