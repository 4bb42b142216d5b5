"""The cards of a report, one for each latent that is shown."""

from functools import cache
from typing import Any

from fastsae.nn import SAE

from .contexts import Shown, number
from .evidence import Evidence
from .geometry import encoder_decoder_cosines, neighbors
from .text import Strings

NEIGHBOR_TOKENS = 2
"""Tokens that are shown of each neighbor, of those that it is most active on."""

Card = dict[str, Any]
"""What the page shows of a latent. Texts are numbers of strings; logits are in standard deviations
over the vocabulary."""


def make_cards(sae: SAE, evidence: Evidence, strings: Strings, seed: int) -> list[Card]:
    """A card for each latent."""
    latents = evidence.latents
    shown = Shown(
        firings=evidence.firings,
        windows=evidence.windows,
        text=evidence.text,
        strings=strings,
        seed=seed,
    )

    @cache
    def main_tokens(latent: int) -> list[int]:
        return [token for token, *_ in shown.tokens(latent, NEIGHBOR_TOKENS)]

    cards = [{"id": latent, **shown.card(latent)} for latent in latents.tolist()]
    for card, near in zip(cards, neighbors(sae, latents), strict=True):
        card["near"] = [[other, cosine, main_tokens(other)] for other, cosine in near]
    if (cosines := encoder_decoder_cosines(sae, latents)) is not None:
        for card, cosine in zip(cards, cosines.tolist(), strict=True):
            card["cosine"] = number(cosine)
    if sae.layers > 1:
        for card, norms in zip(cards, sae.decoder_norms()[latents].tolist(), strict=True):
            card["norms"] = [number(norm) for norm in norms]
    if evidence.lens is not None:
        for card, directions in zip(cards, evidence.lens, strict=True):
            for side in ("promoted", "suppressed"):
                tokens = getattr(directions, side)
                card[side] = [
                    [strings.number(evidence.text[i]), number(v / directions.deviation)]
                    for i, v in tokens
                ]
    return cards
