"""What a model still does when its activations are replaced by their reconstructions."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax, nll_loss, normalize

from fastsae.data.model import (
    Hookpoint,
    TokenBatch,
    hookpoint_at,
    load_model,
    load_tokenizer,
    splice,
)
from fastsae.data.shards import ActivationShards
from fastsae.nn.sae import SAE
from fastsae.progress import progress_bar

from .reconstruction import check_fits, evaluation_mode
from .windows import stored_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Replace = Callable[[Tensor], Tensor]
Read = Callable[[Any, TokenBatch], Tensor]
Measure = Callable[[Tensor, Tensor, TokenBatch], Tensor]


@dataclass(frozen=True, kw_only=True)
class EncoderEffect:
    """How far the sentence embeddings of an encoder move."""

    windows: int
    """Windows of text embedded."""

    tokens: int
    """Tokens whose activation was replaced."""

    cosine: float
    """Cosine between the original embedding and the spliced model's, on average."""

    cosine_zero: float
    """The same with activations set to zero."""

    cosine_mean: float
    """The same with activations set to their mean."""

    recovered_zero: float | None
    """1 - (1 - cosine) / (1 - cosine_zero); None where zeros do no harm."""

    recovered_mean: float | None
    """1 - (1 - cosine) / (1 - cosine_mean); None where the mean does no harm."""


@dataclass(frozen=True, kw_only=True)
class CausalEffect:
    """How much worse a causal language model predicts the next token."""

    windows: int
    """Windows of text read."""

    tokens: int
    """Tokens predicted."""

    ce_clean: float
    """Cross-entropy of the model itself, in nats per token."""

    ce: float
    """Cross-entropy of the spliced model."""

    ce_zero: float
    """Cross-entropy with activations set to zero."""

    ce_mean: float
    """Cross-entropy with activations set to their mean."""

    recovered_zero: float | None
    """(ce_zero - ce) / (ce_zero - ce_clean); None where zeros do no harm."""

    recovered_mean: float | None
    """(ce_mean - ce) / (ce_mean - ce_clean); None where the mean does no harm."""

    kl: float
    """KL(clean || spliced) of the next token, in nats per token."""


Downstream = EncoderEffect | CausalEffect


@torch.no_grad()
def downstream(
    sae: SAE,
    data: ActivationShards,
    *,
    max_windows: int | None = 128,
    batch_size: int = 8,
    device: str | torch.device | None = None,
    model_dtype: str = "float32",
    progress: bool = False,
) -> Downstream | None:
    """Splices the SAE into the model that data was harvested from, and measures the difference.

    The text is the data's own: `max_windows` windows (None: all) spread evenly over it, rebuilt
    from the stored token ids, `batch_size` at a time. Like the data, the SAE knows text tokens
    only: padding and special tokens keep their activations, here and in the two ablations, which
    set the others to zero and to the data's mean row. An encoder is judged by its sentence
    embeddings: the mean of its output over the window, normalised. None if data does not say
    which model and hookpoint it comes from; ValueError if they cannot be loaded, or if data does
    not fit the SAE. `sae` is moved to `device`, if given.
    """
    check_fits(sae, data)
    if data.model is None or data.hookpoint is None:
        return None
    if batch_size < 1 or (max_windows is not None and max_windows < 1):
        raise ValueError(
            f"max_windows and batch_size must be at least 1, got {max_windows} and {batch_size}"
        )
    sae = sae.to(device or sae.b_dec.device)
    model = load_model(data.model, str(sae.b_dec.device), model_dtype)
    hookpoint = hookpoint_at(model, data.hookpoint)
    batches = list(stored_batches(data, load_tokenizer(data.model), max_windows, batch_size))
    shown = progress_bar("downstream", "batch", len(batches), shown=progress, over=batches)
    compare = partial(_compare, model, hookpoint, shown, _ways(sae, data.mean))
    with evaluation_mode(sae):
        if model.can_generate():
            return _causal_effect(compare(_log_probabilities, _losses), batches)
        return _encoder_effect(compare(_embeddings, _cosine), batches)


def _ways(sae: SAE, mean: Float[Tensor, " d_in"]) -> dict[str, Replace]:
    """What activations are replaced by."""
    mean = mean.to(sae.b_dec)
    return {
        "spliced": lambda x: sae(x.to(sae.b_dec)),
        "zero": torch.zeros_like,
        "mean": lambda x: mean.expand_as(x),
    }


def _compare(
    model: "PreTrainedModel",
    hookpoint: Hookpoint,
    batches: Iterable[TokenBatch],
    ways: dict[str, Replace],
    read: Read,
    measure: Measure,
) -> dict[str, Tensor]:
    """measure(clean, changed) summed over batches, of what is read from the outputs of the model
    itself and of the model changed in each way."""
    sums: dict[str, Any] = dict.fromkeys(["clean", *ways], 0)
    for batch in batches:
        batch = TokenBatch(*(tensor.to(model.device) for tensor in batch))
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        clean = read(model(**inputs), batch)
        sums["clean"] += measure(clean, clean, batch)
        for name, replace in ways.items():
            with splice(
                hookpoint.module, partial(_replace_text, batch.keep, replace), hookpoint.at_input
            ):
                changed = read(model(**inputs), batch)
            sums[name] += measure(clean, changed, batch)
    return sums


def _replace_text(
    keep: Bool[Tensor, "B T"], replace: Replace, hidden: Float[Tensor, "B T d_in"]
) -> Float[Tensor, "B T d_in"]:
    hidden = hidden.clone()
    hidden[keep] = replace(hidden[keep]).to(hidden)
    return hidden


def _embeddings(output: Any, batch: TokenBatch) -> Float64[Tensor, "B D"]:
    mask = batch.attention_mask[..., None]
    return normalize((output.last_hidden_state.double() * mask).sum(1), dim=-1)


def _cosine(
    clean: Float64[Tensor, "B D"], changed: Float64[Tensor, "B D"], batch: TokenBatch
) -> Float64[Tensor, ""]:
    return (clean * changed).sum()


def _encoder_effect(cosines: dict[str, Tensor], batches: list[TokenBatch]) -> EncoderEffect:
    windows = sum(len(batch.keep) for batch in batches)
    mean = {name: float(total) / windows for name, total in cosines.items()}
    return EncoderEffect(
        windows=windows,
        tokens=sum(int(batch.keep.sum()) for batch in batches),
        cosine=mean["spliced"],
        cosine_zero=mean["zero"],
        cosine_mean=mean["mean"],
        recovered_zero=_recovered(1.0, mean["spliced"], mean["zero"]),
        recovered_mean=_recovered(1.0, mean["spliced"], mean["mean"]),
    )


def _log_probabilities(output: Any, batch: TokenBatch) -> Float[Tensor, "M V"]:
    """Of all tokens V, before each of the M text tokens that have another before them."""
    return log_softmax(output.logits[:, :-1][batch.keep[:, 1:]].float(), dim=-1)


def _losses(
    clean: Float[Tensor, "M V"], changed: Float[Tensor, "M V"], batch: TokenBatch
) -> Float64[Tensor, "2"]:
    """Cross-entropy and KL(clean || changed), summed over tokens."""
    target = batch.input_ids[:, 1:][batch.keep[:, 1:]]
    loss = nll_loss(changed, target, reduction="none").double().sum()
    kl = kl_div(changed, clean, reduction="none", log_target=True).sum(-1).double().sum()
    return torch.stack([loss, kl])


def _causal_effect(losses: dict[str, Tensor], batches: list[TokenBatch]) -> CausalEffect:
    tokens = sum(int(batch.keep[:, 1:].sum()) for batch in batches)
    if not tokens:
        raise ValueError("no window of the data has two tokens: there is no next token to predict")
    mean = {name: (total / tokens).tolist() for name, total in losses.items()}
    loss = {name: ce for name, (ce, _) in mean.items()}
    return CausalEffect(
        windows=sum(len(batch.keep) for batch in batches),
        tokens=tokens,
        ce_clean=loss["clean"],
        ce=loss["spliced"],
        ce_zero=loss["zero"],
        ce_mean=loss["mean"],
        recovered_zero=_recovered(-loss["clean"], -loss["spliced"], -loss["zero"]),
        recovered_mean=_recovered(-loss["clean"], -loss["spliced"], -loss["mean"]),
        kl=mean["spliced"][1],
    )


def _recovered(clean: float, spliced: float, ablated: float) -> float | None:
    """The share of what the ablation costs that the SAE saves; larger arguments are better."""
    return (spliced - ablated) / (clean - ablated) if ablated < clean else None
