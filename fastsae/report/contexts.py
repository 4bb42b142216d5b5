"""Where a latent is active: its strongest contexts, a few of every strength, and its tokens."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Int, Int32

from .firings import Firings
from .text import Strings, TokenText, Windows

BEFORE, AFTER = 20, 10
"""Tokens of a context around the one that it is about."""
TOP, BANDS, PER_BAND = 10, 5, 2
CANDIDATES = 400
"""Entries of a band, drawn at random, among which PER_BAND contexts are looked for."""
SAME = 4
"""Contexts whose last tokens up to the peak agree in this many places, and in the next one, show
the same."""
BINS = 24
FRAMES = 8
"""Tokens that are listed as those that a latent is most active on."""


def span(windows: Windows, place: int) -> tuple[int, int]:
    """The places of the first token that is shown around a place, and after the last."""
    first, end = int(windows.firsts[place]), int(windows.ends[place])
    return max(first, place - BEFORE), min(end, place + AFTER + 1)


class Distinct:
    """Chooses contexts that neither overlap nor repeat the text of one chosen before."""

    def __init__(self, windows: Windows):
        self.windows = windows
        self.spans: set[tuple[int, int]] = set()
        self.texts: set[bytes] = set()

    def choose(
        self, places: Int32[np.ndarray, " M"], order: Int[np.ndarray, " O"], most: int
    ) -> list[int]:
        """The first entries in an order, up to `most`, whose contexts are distinct."""
        chosen = []
        for entry in order.tolist():
            place = int(places[entry])
            start, end = span(self.windows, place)
            text = self.windows.tokens[max(start, place - SAME) : min(end, place + 2)].tobytes()
            overlaps = any(start < other[1] and other[0] < end for other in self.spans)
            if overlaps or text in self.texts:
                continue
            self.spans.add((start, end))
            self.texts.add(text)
            chosen.append(entry)
            if len(chosen) == most:
                break
        return chosen

    def __or__(self, other: "Distinct") -> "Distinct":
        """Which also differs from what the other chose."""
        both = Distinct(self.windows)
        both.spans, both.texts = self.spans | other.spans, self.texts | other.texts
        return both


@dataclass(frozen=True, kw_only=True)
class Shown:
    """Makes what a card shows of a latent's activations."""

    firings: Firings
    windows: Windows | None
    text: TokenText
    strings: Strings
    seed: int

    def card(self, latent: int) -> dict[str, Any]:
        """A latent's activations, as the page reads them."""
        places, values = self.firings.of(latent)
        card: dict[str, Any] = {"count": len(values), "histogram": histogram(values)}
        if self.windows is None or not len(values):
            return card
        order = np.argsort(-np.abs(values), kind="stable")
        above = Distinct(self.windows)
        signs = [("top", values > 0), ("low", values < 0)]
        for name, sign in signs:
            if sign.any():
                own = Distinct(self.windows)
                chosen = own.choose(places, order[sign[order]], TOP)
                card[name] = [self.context(self.windows, latent, i) for i in chosen]
                above |= own
        card["bands"] = self.bands(self.windows, latent, order, above)
        card["tokens"] = self.tokens(latent)
        return card

    def bands(
        self, windows: Windows, latent: int, order: Int[np.ndarray, " M"], above: Distinct
    ) -> list[dict[str, Any]]:
        """Contexts drawn at random from equal parts of the entries, strongest first, that differ
        from those above; none if there are so few entries that the strongest are all."""
        places, values = self.firings.of(latent)
        if len(order) <= TOP:
            return []
        generator = np.random.Generator(np.random.PCG64([self.seed, latent]))
        found = []
        for part in np.array_split(order, BANDS):
            mixed = generator.permutation(part)[:CANDIDATES]
            chosen = above.choose(places, mixed, PER_BAND)
            chosen.sort(key=lambda i: -abs(float(values[i])))
            size = np.abs(values[part])
            contexts = [self.context(windows, latent, i) for i in chosen]
            ends = [number(size.min()), number(size.max())]
            counts = {"count": len(part), "negative": int((values[part] < 0).sum())}
            found.append({"range": ends, **counts, "contexts": contexts})
        return found

    def context(self, windows: Windows, latent: int, entry: int) -> dict[str, Any]:
        """The text around an entry: numbers of strings, the place of the entry among them, and
        places and activations of those tokens that the latent is active on."""
        places, values = self.firings.of(latent)
        place = int(places[entry])
        start, end = span(windows, place)
        low, high = np.searchsorted(places, [start, end])
        active = zip(places[low:high].tolist(), values[low:high].tolist(), strict=True)
        return {
            "text": [self.strings.number(self.text[t]) for t in windows.tokens[start:end].tolist()],
            "peak": place - start,
            "active": [x for at, value in active for x in (at - start, number(value))],
            "cut": [int(start > windows.firsts[place]), int(end < windows.ends[place])],
        }

    def tokens(self, latent: int, most: int = FRAMES) -> list[list[Any]]:
        """Up to `most` tokens with most of a latent's activation, none without text: the string,
        its share of the sum of activations, and on how many of its occurrences the latent is
        active."""
        if self.windows is None:
            return []
        places, values = self.firings.of(latent)
        found, inverse, counts = np.unique(
            self.windows.tokens[places], return_inverse=True, return_counts=True
        )
        total = np.bincount(inverse, np.abs(values).astype(np.float64))
        best = np.argsort(-total, kind="stable")[:most]
        rows = []
        for i in best.tolist():
            token, count = int(found[i]), int(counts[i])
            shares = total[i] / total.sum(), count / int(self.windows.occurrences[token])
            rows.append([self.strings.number(self.text[token]), *map(number, shares)])
        return rows


def histogram(values: Float32[np.ndarray, " M"]) -> dict[str, Any] | None:
    """How many activations are how large, in equal steps from 0."""
    if not len(values):
        return None
    ends = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    counts, _ = np.histogram(values.astype(np.float64), BINS, ends)
    return {"from": number(ends[0]), "to": number(ends[1]), "counts": counts.tolist()}


def number(value: float | np.floating) -> float:
    """To four digits, which is all that is shown."""
    return float(f"{value:.4g}")
