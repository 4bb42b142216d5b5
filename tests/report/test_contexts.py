"""Contexts show the text around a latent's activations, with the activations of its tokens."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fastsae.data import ActivationArray, Contexts
from fastsae.nn import SAE, AbsTopK
from fastsae.report.config import ReportConfig
from fastsae.report.contexts import AFTER, BANDS, BEFORE, PER_BAND, TOP, Shown, number, span
from fastsae.report.firings import collect
from fastsae.report.text import Strings, TokenText, windows_of

WINDOW, TOKENS = 40, 2000


@pytest.fixture(scope="module")
def shown() -> Shown:
    """Signed codes of random activations; a token's text is its number."""
    torch.manual_seed(0)
    places = torch.arange(TOKENS)
    labels = torch.randint(100, (TOKENS,)), places % WINDOW, places // WINDOW
    data = ActivationArray(torch.randn(TOKENS, 8), Contexts(*labels))
    firings = collect(SAE(8, 16, AbsTopK(4)).eval(), data, ReportConfig(), progress=False)
    windows = windows_of(data, firings.rows)
    return Shown(firings=firings, windows=windows, text=TokenText(None), strings=Strings(), seed=0)


def peaks(contexts: list) -> list[float]:
    values = []
    for context in contexts:
        active = dict(zip(context["active"][::2], context["active"][1::2], strict=True))
        assert len(active) == len(context["active"]) / 2
        values.append(active[context["peak"]])
    return values


def test_the_strongest_of_each_sign_come_first(shown):
    for latent in range(16):
        card, (_, values) = shown.card(latent), shown.firings.of(latent)
        top, low = peaks(card["top"]), peaks(card["low"])
        assert top == sorted(top, reverse=True) and len(top) == TOP
        assert low == sorted(low) and max(low) < 0 < min(top)
        assert top[0] == pytest.approx(values.max(), rel=1e-3)
        assert low[0] == pytest.approx(values.min(), rel=1e-3)
        assert sum(card["histogram"]["counts"]) == card["count"] == len(values)


def test_a_context_is_the_text_of_one_window(shown):
    windows, firings = shown.windows, shown.firings
    for entry, place in enumerate(firings.of(3)[0].tolist()):
        context = shown.context(windows, 3, entry)
        start = place - context["peak"]
        end = start + len(context["text"])
        assert place // WINDOW == start // WINDOW == (end - 1) // WINDOW
        assert place - start <= BEFORE and end - place <= AFTER + 1
        assert context["cut"] == [int(start % WINDOW > 0), int(end % WINDOW > 0)]
        texts = [shown.strings.texts[number] for number in context["text"]]
        assert texts == [f"#{token} " for token in windows.tokens[start:end]]
        places, values = firings.of(3)
        inside = (places >= start) & (places < end)
        assert context["active"][::2] == (places[inside] - start).tolist()
        np.testing.assert_allclose(context["active"][1::2], values[inside], rtol=1e-3)


def test_bands_are_equal_parts_of_all_strengths(shown):
    bands = shown.card(5)["bands"]
    assert len(bands) == BANDS and all(len(band["contexts"]) == PER_BAND for band in bands)
    for stronger, weaker in zip(bands, bands[1:], strict=False):
        assert stronger["range"][0] >= weaker["range"][1] * 0.999
    for band in bands:
        low, high = band["range"]
        assert all(low * 0.999 <= abs(v) <= high * 1.001 for v in peaks(band["contexts"]))


def test_no_context_is_shown_twice_and_none_that_is_stronger_is_left_out(shown):
    """Checked against all entries of a sign, one after the other."""
    places, values = shown.firings.of(0)
    spans = [span(shown.windows, place) for place in places.tolist()]
    overlap = lambda a, b: a[0] < b[1] and b[0] < a[1]  # noqa: E731
    wanted = []
    for entry in np.argsort(-values):
        if not any(overlap(spans[entry], spans[other]) for other in wanted):
            wanted.append(entry)
    card = shown.card(0)
    assert peaks(card["top"]) == [number(values[i]) for i in wanted[:TOP]]
    samples = [context for band in card["bands"] for context in band["contexts"]]
    for band in card["bands"]:
        size = np.abs(peaks(band["contexts"]))
        assert (size[:-1] >= size[1:]).all()
    assert all(v <= peaks(card["top"])[-1] for v in peaks(samples))
    assert all(v >= peaks(card["low"])[-1] for v in peaks(samples))
    texts = [tuple(one["text"]) for one in samples + card["top"]]
    assert len(set(texts)) == len(texts)


def test_repeated_text_is_shown_once(shown):
    """All windows have the same text: a place in it has one context, the strongest."""
    windows = replace(shown.windows, tokens=np.resize(np.arange(WINDOW), TOKENS))
    card = replace(shown, windows=windows).card(0)
    for name in ("top", "low"):
        centers = [context["text"][context["peak"]] for context in card[name]]
        assert len(set(centers)) == len(centers) == TOP
    samples = [context for band in card["bands"] for context in band["contexts"]]
    centers = [context["text"][context["peak"]] for context in card["top"] + samples]
    assert len(set(centers)) == len(centers)
    assert all(v <= peaks(card["top"])[-1] for v in peaks(samples))


def test_the_tokens_that_it_is_active_on(shown):
    places, values = shown.firings.of(2)
    ids = shown.windows.tokens[places]
    sums = {token: np.abs(values[ids == token]).sum() for token in set(ids.tolist())}
    rows = shown.card(2)["tokens"]
    assert [row[1] for row in rows] == sorted((row[1] for row in rows), reverse=True)
    for text, share, of in rows:
        token = int(shown.strings.texts[text][1:])
        assert share == pytest.approx(sums[token] / np.abs(values).sum(), rel=1e-3)
        assert of == pytest.approx(
            (ids == token).sum() / (shown.windows.tokens == token).sum(), 1e-3
        )
        assert sums[token] >= sorted(sums.values())[-8]


def test_without_text_a_card_has_numbers_only(shown):
    plain = Shown(firings=shown.firings, windows=None, text=shown.text, strings=Strings(), seed=0)
    assert plain.card(1).keys() == {"count", "histogram"}
