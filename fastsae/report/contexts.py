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
"""Strongest entries among which TOP different contexts are looked for."""
SAME = 4
"""Contexts whose last tokens up to the peak agree in this many places, and in the next one, show
the same."""
BINS = 24
FRAMES = 8
"""Tokens that are listed as those that a latent is most active on."""


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
        signs = [("top", values > 0), ("low", values < 0)]
        for name, sign in signs:
            if sign.any():
                chosen = self.different(self.windows, places, order[sign[order]])
                card[name] = [self.context(self.windows, latent, int(i)) for i in chosen]
        card["bands"] = self.bands(self.windows, latent, order)
        card["tokens"] = self.tokens(self.windows, places, values)
        return card

    def different(
        self, windows: Windows, places: Int32[np.ndarray, " M"], order: Int[np.ndarray, " O"]
    ) -> list[int]:
        """The first TOP entries in an order that are in different windows, with other text."""
        seen, chosen = set(), []
        for entry in order[:CANDIDATES].tolist():
            place = int(places[entry])
            first, end = int(windows.firsts[place]), int(windows.ends[place])
            near = windows.tokens[max(first, place - SAME) : min(end, place + 2)]
            keys = {first, near.tobytes()}
            if seen.isdisjoint(keys):
                seen |= keys
                chosen.append(entry)
            if len(chosen) == TOP:
                break
        return chosen

    def bands(
        self, windows: Windows, latent: int, order: Int[np.ndarray, " M"]
    ) -> list[dict[str, Any]]:
        """Contexts drawn at random from equal parts of the entries, strongest first; none if there
        are so few that the strongest are all."""
        places, values = self.firings.of(latent)
        if len(order) <= TOP:
            return []
        generator = np.random.Generator(np.random.PCG64([self.seed, latent]))
        found = []
        for part in np.array_split(order, BANDS):
            mixed = generator.permutation(part)
            chosen = sorted(self.different(windows, places, mixed)[:PER_BAND])
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
        start = max(int(windows.firsts[place]), place - BEFORE)
        end = min(int(windows.ends[place]), place + AFTER + 1)
        low, high = np.searchsorted(places, [start, end])
        active = zip(places[low:high].tolist(), values[low:high].tolist(), strict=True)
        return {
            "text": [self.strings.number(self.text[t]) for t in windows.tokens[start:end].tolist()],
            "peak": place - start,
            "active": [x for at, value in active for x in (at - start, number(value))],
            "cut": [int(start > windows.firsts[place]), int(end < windows.ends[place])],
        }

    def tokens(
        self, windows: Windows, places: Int32[np.ndarray, " M"], values: Float32[np.ndarray, " M"]
    ) -> list[list[Any]]:
        """The tokens with most of a latent's activation: the string, its share of the sum of
        activations, and on how many of the token's occurrences the latent is active."""
        found, inverse, counts = np.unique(
            windows.tokens[places], return_inverse=True, return_counts=True
        )
        total = np.bincount(inverse, np.abs(values).astype(np.float64))
        best = np.argsort(-total, kind="stable")[:FRAMES]
        rows = []
        for i in best.tolist():
            token, count = int(found[i]), int(counts[i])
            shares = total[i] / total.sum(), count / int(windows.occurrences[token])
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
