"""The cards of a report, one for each latent that is shown."""

from typing import Any

from jaxtyping import Int64
from torch import Tensor

from fastsae.data import StoredActivations
from fastsae.nn import SAE

from .config import ReportConfig
from .contexts import Shown, number
from .firings import Firings
from .geometry import encoder_decoder_cosines, neighbors
from .lens import NoLens, logit_lens
from .text import Strings, token_text, windows_of

Card = dict[str, Any]
"""What the page shows of a latent. Texts are numbers of strings."""


def make_cards(
    sae: SAE,
    data: StoredActivations,
    config: ReportConfig,
    firings: Firings,
    latents: Int64[Tensor, " n"],
    strings: Strings,
) -> tuple[list[Card], list[str]]:
    """A card for each latent, and notes on what cards do not have, and why."""
    notes = []
    windows = windows_of(data, firings.rows)
    text, no_tokenizer = token_text(data, config.trust_remote_code)
    if windows is None:
        notes.append("No contexts: the text of these activations is unknown.")
    elif no_tokenizer is not None:
        notes.append(f"Tokens are shown by their numbers: {no_tokenizer}.")
    shown = Shown(firings=firings, windows=windows, text=text, strings=strings, seed=config.seed)
    cards = [{"id": latent, **shown.card(latent)} for latent in latents.tolist()]
    for card, near in zip(cards, neighbors(sae, latents), strict=True):
        card["near"] = near
    if (cosines := encoder_decoder_cosines(sae, latents)) is not None:
        for card, cosine in zip(cards, cosines.tolist(), strict=True):
            card["cosine"] = number(cosine)
    if sae.layers > 1:
        for card, norms in zip(cards, sae.decoder_norms()[latents].tolist(), strict=True):
            card["norms"] = [number(norm) for norm in norms]
    if config.lens:
        try:
            lens = logit_lens(sae, latents, data, text, strings, config.trust_remote_code)
            for card, directions in zip(cards, lens, strict=True):
                card |= directions
        except NoLens as reason:
            notes.append(f"No logit lens: {reason}.")
    else:
        notes.append("No logit lens: `fastsae report RUN` adds it for a causal language model.")
    return cards, notes
