"""Effect on a model's outputs when its activations are replaced by their reconstructions."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax, nll_loss, normalize

from fastsae.data.hookpoints import Hookpoint, hookpoints_at, runner, splice
from fastsae.data.model import ModelFiles, TokenBatch, load_model, load_tokenizer
from fastsae.data.ordinary import MAX_NORM_RATIO, SAMPLE_TOKENS, Ordinary
from fastsae.data.source import TextActivations
from fastsae.nn.sae import SAE
from fastsae.progress import progress_bar
from fastsae.shards import Shards

from .reconstruction import check_fits, evaluation_mode
from .windows import stored_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Replace = Callable[[Tensor], Tensor]
Read = Callable[[Any, TokenBatch], Tensor]
Measure = Callable[[Tensor, Tensor, TokenBatch], Float64[Tensor, " sums"]]


@dataclass(frozen=True, kw_only=True)
class EncoderEffect:
    """Change of an encoder's sentence embeddings."""

    windows: int
    """Windows of text embedded."""

    tokens: int
    """Tokens of text whose activations were replaced, those of extreme norm included."""

    cosine: float
    """Mean cosine similarity of the original embeddings and the spliced model's."""

    cosine_all: float
    """The same with tokens of extreme norm replaced too."""

    cosine_zero: float
    """The same with zero ablation."""

    cosine_mean: float
    """The same with mean ablation."""

    recovered_zero: float | None
    """1 - (1 - cosine) / (1 - cosine_zero); None if zero ablation does no damage."""

    recovered_mean: float | None
    """1 - (1 - cosine) / (1 - cosine_mean); None if mean ablation does no damage."""


@dataclass(frozen=True, kw_only=True)
class CausalEffect:
    """Change of a causal language model's next-token predictions."""

    windows: int
    """Windows of text."""

    tokens: int
    """Tokens predicted."""

    ce_clean: float
    """Cross-entropy of the original model, in nats per token."""

    ce: float
    """Cross-entropy of the spliced model."""

    ce_all: float
    """The same with tokens of extreme norm replaced too."""

    ce_zero: float
    """Cross-entropy with zero ablation."""

    ce_mean: float
    """Cross-entropy with mean ablation."""

    recovered_zero: float | None
    """(ce_zero - ce) / (ce_zero - ce_clean); None if zero ablation does no damage."""

    recovered_mean: float | None
    """(ce_mean - ce) / (ce_mean - ce_clean); None if mean ablation does no damage."""

    kl: float
    """KL(clean || spliced) of the next-token distributions, in nats per token."""


Downstream = EncoderEffect | CausalEffect


@torch.no_grad()
def downstream(
    sae: SAE,
    data: TextActivations,
    *,
    max_windows: int | None = 128,
    batch_size: int = 8,
    device: str | torch.device | None = None,
    model_dtype: str = "float32",
    trust_remote_code: bool = False,
    max_norm_ratio: float | None = MAX_NORM_RATIO,
    progress: bool = False,
) -> Downstream | None:
    """Splice the SAE into the model that the data was harvested from, and measure the effect.

    Args:
        sae: an autoencoder, moved to `device` if that is given.
        data: activations with their model and hookpoint; None is returned if they are unknown.
        max_windows: number of windows of the data's text, spread evenly and rebuilt from the
            stored token ids; None for all.
        batch_size: windows per forward pass.
        trust_remote_code: whether to run Python code that comes with the model.
        max_norm_ratio: tokens that are further from the data's mean than this multiple of the
            median distance keep their activations; None replaces all.

    Of processes that share an SAE, each place on the data axis runs the model on batches of its
    own, and all get the numbers of all.

    Padding and special tokens, which the SAE was not trained on, keep their activations too; so
    they do in the two ablations, which set the others to zero and to the mean of ordinary tokens. A
    causal language model is measured by its next-token predictions, an encoder by its sentence
    embeddings: the normalized mean of its output over a window. Of an encoder-decoder, the encoder
    alone runs if the hookpoint is in it. ValueError if the model or hookpoint cannot be loaded, or
    if the data does not fit the SAE.
    """
    check_fits(sae, data)
    if data.model is None or data.hookpoint is None or not data.has_contexts:
        return None
    if batch_size < 1 or (max_windows is not None and max_windows < 1):
        raise ValueError(
            f"max_windows and batch_size must be at least 1, got {max_windows} and {batch_size}"
        )
    sae = sae.to(device or sae.b_dec.device)
    files = ModelFiles.of(data.harvest, trust_remote_code)
    model = load_model(data.model, str(sae.b_dec.device), model_dtype, files)
    (hookpoint,) = hookpoints_at(model, [data.hookpoint])
    tokenizer = load_tokenizer(data.model, files)
    batches = list(stored_batches(data, tokenizer, max_windows, batch_size))
    own = batches[sae.shards.data_rank :: sae.shards.data]
    shown = progress_bar("downstream", "batch", len(own), shown=progress, over=own)
    ordinary = Ordinary.of(data.sample(SAMPLE_TOKENS), max_norm_ratio)
    compare = partial(_compare, model, hookpoint, shown, _replacements(sae, ordinary))
    with evaluation_mode(sae):
        if model.can_generate() and runner(model, [hookpoint]) is model:
            losses = compare(log_probabilities, _losses, torch.zeros(2, dtype=torch.float64))
            return _causal_effect(_of_all(losses, sae.shards), batches)
        cosines = compare(_embeddings, _cosine, torch.zeros(1, dtype=torch.float64))
        return _encoder_effect(_of_all(cosines, sae.shards), batches)


def _of_all(sums: dict[str, Tensor], shards: Shards) -> dict[str, Tensor]:
    """Sums over the batches of all places on the data axis."""
    return {name: shards.sum_data(own) for name, own in sums.items()}


def _replacements(sae: SAE, ordinary: Ordinary) -> dict[str, Replace]:
    mean = ordinary.mean.to(sae.b_dec)
    replacements: dict[str, Replace] = {
        "spliced": sae,
        "zero": torch.zeros_like,
        "mean": lambda x: mean.expand_as(x),
    }
    of_ordinary: dict[str, Replace] = {
        name: partial(_of_ordinary, ordinary, replace) for name, replace in replacements.items()
    }
    return of_ordinary | {"all": sae}


def _of_ordinary(ordinary: Ordinary, replace: Replace, x: Float[Tensor, "N d_in"]) -> Tensor:
    """The replacements of ordinary tokens; the others stay."""
    return torch.where(ordinary.has(x.float())[:, None], replace(x).to(x), x)


def _compare(
    model: "PreTrainedModel",
    hookpoint: Hookpoint,
    batches: Iterable[TokenBatch],
    replacements: dict[str, Replace],
    read: Read,
    measure: Measure,
    zero: Float64[Tensor, " sums"],
) -> dict[str, Tensor]:
    """measure(clean, changed) summed over batches, for each replacement and for the original model,
    where clean and changed are what `read` takes from the model's outputs. `zero` is the sum of
    none."""
    sums = dict.fromkeys(["clean", *replacements], zero.to(model.device))
    run = runner(model, [hookpoint])
    for batch in batches:
        batch = TokenBatch(*(tensor.to(model.device) for tensor in batch))
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        clean = read(run(**inputs), batch)
        sums["clean"] = sums["clean"] + measure(clean, clean, batch)
        for name, replace in replacements.items():
            replaced = partial(replace_text, batch.keep, replace)
            with splice(hookpoint, replaced, len(batch.keep)):
                changed = read(run(**inputs), batch)
            sums[name] = sums[name] + measure(clean, changed, batch)
    return sums


def replace_text(
    keep: Bool[Tensor, "B T"], replace: Replace, hidden: Float[Tensor, "B T d_in"]
) -> Float[Tensor, "B T d_in"]:
    """Hidden states whose rows at `keep` are replaced by what `replace` makes of them."""
    hidden = hidden.clone()
    hidden[keep] = replace(hidden[keep]).to(hidden)
    return hidden


def _embeddings(output: Any, batch: TokenBatch) -> Float64[Tensor, "B D"]:
    mask = batch.attention_mask[..., None]
    return normalize((output.last_hidden_state.double() * mask).sum(1), dim=-1)


def _cosine(
    clean: Float64[Tensor, "B D"], changed: Float64[Tensor, "B D"], batch: TokenBatch
) -> Float64[Tensor, "1"]:
    return (clean * changed).sum()[None]


def _encoder_effect(cosines: dict[str, Tensor], batches: list[TokenBatch]) -> EncoderEffect:
    windows = sum(len(batch.keep) for batch in batches)
    mean = {name: float(total) / windows for name, total in cosines.items()}
    return EncoderEffect(
        windows=windows,
        tokens=sum(int(batch.keep.sum()) for batch in batches),
        cosine=mean["spliced"],
        cosine_all=mean["all"],
        cosine_zero=mean["zero"],
        cosine_mean=mean["mean"],
        recovered_zero=_recovered(1.0, mean["spliced"], mean["zero"]),
        recovered_mean=_recovered(1.0, mean["spliced"], mean["mean"]),
    )


def log_probabilities(output: Any, batch: TokenBatch) -> Float[Tensor, "M V"]:
    """Of the vocabulary V, for each of the M text tokens that have a predecessor."""
    logits = output.logits[:, :-1][batch.keep[:, 1:]]
    return log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)


def predicted(batch: TokenBatch) -> Int[Tensor, " M"]:
    """The text tokens that have a predecessor."""
    return batch.input_ids[:, 1:][batch.keep[:, 1:]]


def _losses(
    clean: Float[Tensor, "M V"], changed: Float[Tensor, "M V"], batch: TokenBatch
) -> Float64[Tensor, "2"]:
    """Cross-entropy and KL(clean || changed), summed over tokens."""
    loss = nll_loss(changed, predicted(batch), reduction="none").double().sum()
    kl = kl_div(changed, clean, reduction="none", log_target=True).sum(-1).double().sum()
    return torch.stack([loss, kl])


def _causal_effect(losses: dict[str, Tensor], batches: list[TokenBatch]) -> CausalEffect:
    tokens = sum(int(batch.keep[:, 1:].sum()) for batch in batches)
    if not tokens:
        raise ValueError("no window of the data has two tokens: no next token to predict")
    mean = {name: (total / tokens).tolist() for name, total in losses.items()}
    loss = {name: ce for name, (ce, _) in mean.items()}
    return CausalEffect(
        windows=sum(len(batch.keep) for batch in batches),
        tokens=tokens,
        ce_clean=loss["clean"],
        ce=loss["spliced"],
        ce_all=loss["all"],
        ce_zero=loss["zero"],
        ce_mean=loss["mean"],
        recovered_zero=_recovered(-loss["clean"], -loss["spliced"], -loss["zero"]),
        recovered_mean=_recovered(-loss["clean"], -loss["spliced"], -loss["mean"]),
        kl=mean["spliced"][1],
    )


def _recovered(clean: float, spliced: float, ablated: float) -> float | None:
    """The fraction of an ablation's damage that the SAE avoids; larger arguments are better."""
    return (spliced - ablated) / (clean - ablated) if ablated < clean else None
