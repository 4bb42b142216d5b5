"""Training on what a model predicts with the reconstruction in place of its activations.

The loss of a batch then has a further term: KL(clean || spliced) of the next-token distributions,
or the cross-entropy of the spliced model, averaged over the tokens of a few windows of text
(arXiv:2405.12241). Gradients pass through the model's later layers to the SAE alone.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import kl_div, nll_loss

from fastsae.data import ActivationSource, ModelProducer, Stream
from fastsae.data.hookpoints import Hookpoint, runner, splice
from fastsae.data.model import TokenBatch
from fastsae.data.ordinary import Ordinary
from fastsae.evals.downstream import log_probabilities, predicted, replace_text
from fastsae.nn import SAE

from .config import TrainConfig
from .standardization import Standardization
from .state import TrainState


@dataclass(frozen=True, kw_only=True)
class EndToEnd:
    """The downstream term of a run at one hookpoint."""

    kind: Literal["kl", "ce"]
    coef: float
    windows: int
    """Drawn for each step, from the first ones of the text."""
    seed: int
    producer: ModelProducer
    hookpoint: Hookpoint

    @classmethod
    def of(cls, config: TrainConfig, source: ActivationSource) -> "EndToEnd | None":
        """The term that a config asks for, if any; ValueError unless the source is a stream from a
        causal language model, with text to predict."""
        if config.downstream == "none":
            return None
        wanted = f'downstream "{config.downstream}" needs'
        producer = source.producer if isinstance(source, Stream) else source
        if not isinstance(source, Stream) or not isinstance(producer, ModelProducer):
            raise ValueError(f"{wanted} a stream from a model, got {type(producer).__name__}")
        (hookpoint,) = (producer.hookpoints[name] for name in source.hookpoints)
        model = producer.model
        if not model.can_generate() or runner(model, [hookpoint]) is not model:
            found = type(model).__name__
            raise ValueError(f"{wanted} a causal language model with its head, got {found}")
        if not producer.first_windows:
            raise ValueError(f"{wanted} text to predict: no context has two tokens")
        return cls(
            kind=config.downstream,
            coef=config.downstream_coef,
            windows=config.downstream_windows,
            seed=config.seed if config.data_seed is None else config.data_seed,
            producer=producer,
            hookpoint=hookpoint,
        )

    def term(self, state: TrainState, ordinary: Ordinary) -> tuple[float, Float[Tensor, ""]]:
        """The coefficient and the term for a state's next step."""
        return self.coef, self.loss(state.sae, state.units, ordinary, self.batch(state.step))

    def batch(self, step: int) -> TokenBatch:
        """The windows of a step: they follow from the seed, so a resumed run sees the same."""
        known = self.producer.first_windows
        generator = np.random.Generator(np.random.Philox(key=[self.seed, step]))
        drawn = generator.choice(len(known), min(self.windows, len(known)), replace=False)
        batch = self.producer.batch([known[i] for i in drawn])
        return TokenBatch(*(tensor.to(self.producer.model.device) for tensor in batch))

    def loss(
        self, sae: SAE, units: Standardization, ordinary: Ordinary, batch: TokenBatch
    ) -> Float[Tensor, ""]:
        """KL divergence or cross-entropy in nats per predicted token, differentiable in the SAE.

        Args:
            sae: reconstructs activations that `units` has standardized.
            ordinary: the tokens whose activations are replaced, if they are text.
        """

        def spliced(hidden: Float[Tensor, "B T d_in"]) -> Float[Tensor, "B T d_in"]:
            near = ordinary.has(hidden.flatten(0, 1).float()).view_as(batch.keep)
            return replace_text(batch.keep & near, partial(reconstructed, sae, units), hidden)

        # Fused attention adds up gradients in no fixed order on a GPU.
        with self.producer.lock, sdpa_kernel(SDPBackend.MATH):
            with torch.no_grad():
                clean = self.predictions(batch) if self.kind == "kl" else None
            with splice(self.hookpoint, spliced, len(batch.keep)):
                changed = self.predictions(batch)
        if clean is None:
            return nll_loss(changed, predicted(batch))
        return kl_div(changed, clean, reduction="batchmean", log_target=True)

    def predictions(self, batch: TokenBatch) -> Float[Tensor, "M V"]:
        model = self.producer.model
        output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        return log_probabilities(output, batch)


def reconstructed(
    sae: SAE, units: Standardization, x: Float[Tensor, "N d_in"]
) -> Float[Tensor, "N d_in"]:
    """The reconstruction of activations as they are, by an SAE of standardized ones."""
    return units.undo(sae(units(x.to(sae.W_enc, copy=True))))
