"""What cards and dashboards show of latents: where they are active, the text there, and the logit
lens."""

from dataclasses import dataclass, replace

from jaxtyping import Bool, Int64
from torch import Tensor

from fastsae.data import StoredActivations
from fastsae.nn import SAE

from .config import ReportConfig
from .firings import Firings
from .lens import Directions, NoLens, logit_lens
from .subject import published_text
from .text import TokenText, Windows, token_text, windows_of


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What cards and dashboards show, and what it is computed from."""

    latents: Int64[Tensor, " n"]
    """Their numbers."""

    firings: Firings
    windows: Windows | None
    text: TokenText
    lens: list[Directions] | None
    """One entry for each latent."""

    notes: list[str]
    """What is missing, and why."""

    def only(self, kept: Bool[Tensor, " n"]) -> "Evidence":
        """The same of some of the latents."""
        lens = self.lens and [one for one, keep in zip(self.lens, kept, strict=True) if keep]
        return replace(self, latents=self.latents[kept], lens=lens)

    @classmethod
    def gather(
        cls,
        sae: SAE,
        data: StoredActivations,
        config: ReportConfig,
        firings: Firings,
        latents: Int64[Tensor, " n"],
    ) -> "Evidence":
        notes, lens = [], None
        windows = windows_of(data, firings.rows)
        text, no_tokenizer = token_text(data, config.trust_remote_code)
        if windows is None:
            notes.append("No contexts: the text of these activations is unknown.")
        elif no_tokenizer is not None:
            notes.append(f"Tokens are shown by their numbers: {no_tokenizer}.")
        if config.lens:
            try:
                histograms = config.neuronpedia is not None
                lens = logit_lens(sae, latents, data, config.trust_remote_code, histograms)
            except NoLens as reason:
                notes.append(f"No logit lens: {reason}.")
        else:
            notes.append("No logit lens: `fastsae report RUN` adds it for a causal language model.")
        notes = [published_text(note, getattr(data, "model", None)) for note in notes]
        return cls(
            latents=latents, firings=firings, windows=windows, text=text, lens=lens, notes=notes
        )
