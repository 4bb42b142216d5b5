"""The logit lens: which next tokens a latent's decoder row promotes and suppresses."""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn

from fastsae.data import StoredActivations
from fastsae.data.model import ModelFiles, load_causal
from fastsae.memory import available_memory
from fastsae.nn import SAE

from .bars import NO_BARS, Bars, bars

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EACH = 10
"""Tokens that are shown of each sign."""
RANDOM, PART = 256, 0.95
"""Random directions that rows are compared with, and the part of them without a clear effect."""
AT_ONCE = 64
"""Latents whose logits of the whole vocabulary are in memory."""
LAST_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "embedding_norm")
"""What the normalization before the unembedding is called in models' code."""


class NoLens(ValueError):
    """Why there is no logit lens."""


class Directions(NamedTuple):
    """What a latent's decoder row does to the logits of the next token."""

    promoted: list[tuple[int, float]]
    """The tokens whose logits it raises most, and by how much."""

    suppressed: list[tuple[int, float]]
    """The same of those it lowers most."""

    deviation: float
    """The standard deviation of its logits over the vocabulary; above 0."""

    level: float
    """Multiple of it from which the effect on a token is clear, the same for all latents: PART of
    RANDOM directions have no logit that is as far from the mean."""

    histogram: Bars
    """Of the logits of the whole vocabulary; without bars unless it was asked for."""


@torch.no_grad()
def logit_lens(
    sae: SAE,
    latents: Int64[Tensor, " n"],
    data: StoredActivations,
    trust_remote_code: bool,
    histograms: bool = False,
) -> list[Directions]:
    """For each latent, the tokens whose logits its decoder row raises and lowers most.

    The row goes through the model's last normalization and its unembedding, without the layers
    between; logits are relative to their mean over the vocabulary. Random directions go the same
    way, so that noise can be told. With `histograms`, there is also a histogram of each latent's
    logits. NoLens says why not.
    """
    model = causal_model(sae, data, trust_remote_code)
    head: Any = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.shape[1] != sae.W_dec.shape[1]:
        raise NoLens("the decoder rows do not have the width of the model's unembedding")
    found: list[Directions] = []
    level = clear_level(model, weight)
    for some in latents.split(AT_ONCE):
        logits, deviations = through_head(model, weight, sae.W_dec.detach()[some])
        if not logits.isfinite().all():
            raise NoLens("the logits of the decoder rows are not all finite")
        each = min(EACH, logits.shape[1])
        sides = (pairs(*logits.topk(each, largest=largest)) for largest in (True, False))
        wide = logits.numpy()
        counted = map(bars, wide) if histograms else [NO_BARS] * len(wide)
        levels = [level] * len(wide)
        found += map(Directions, *sides, deviations.tolist(), levels, counted)
    return found


def through_head(
    model: "PreTrainedModel", weight: Float[Tensor, "V D"], rows: Float[Tensor, "n D"]
) -> tuple[Float32[Tensor, "n V"], Float32[Tensor, " n"]]:
    """Logits of rows, relative to each row's mean, and each row's standard deviation."""
    logits = (through_norm(model, rows.to(weight)) @ weight.T).float()
    logits -= logits.mean(1, keepdim=True)
    return logits, logits.std(1, correction=0).clamp_min(torch.finfo().tiny)


def clear_level(model: "PreTrainedModel", weight: Float[Tensor, "V D"]) -> float:
    """The PART quantile of how far from the mean the furthest logit of a random direction is, in
    standard deviations of its logits; always of the same directions."""
    rows = torch.randn(RANDOM, weight.shape[1], generator=torch.Generator().manual_seed(0))
    furthest = []
    for some in rows.split(AT_ONCE):
        logits, deviations = through_head(model, weight, some)
        furthest.append(logits.abs().amax(1) / deviations)
    return float(torch.cat(furthest).quantile(PART))


def pairs(values: Tensor, tokens: Tensor) -> list[list[tuple[int, float]]]:
    """Tokens with their values, row by row."""
    rows = zip(tokens.tolist(), values.tolist(), strict=True)
    return [[*zip(ids, own, strict=True)] for ids, own in rows]


def causal_model(sae: SAE, data: StoredActivations, trust_remote_code: bool) -> "PreTrainedModel":
    """The causal language model of the data; NoLens if there is none or it does not fit."""
    name = getattr(data, "model", None)
    if name is None:
        raise NoLens("the data names no model")
    if sae.layers > 1:
        raise NoLens("a crosscoder's decoder rows are of several layers")
    files = ModelFiles.of(getattr(data, "harvest", {}), trust_remote_code)
    try:
        model = load_causal(name, files, available_memory() // 2)
    except ValueError as error:
        raise NoLens(str(error)) from None
    if model is None:
        raise NoLens("the model has no unembedding: it does not predict next tokens")
    return model


def through_norm(model: "PreTrainedModel", rows: Float[Tensor, "n D"]) -> Float[Tensor, "n D"]:
    """Rows as the model's last normalization passes them on, without its bias; as they are if no
    such module is found."""
    norm = next((found for name in LAST_NORMS if (found := child(model.base_model, name))), None)
    return rows if norm is None else norm(rows) - norm(torch.zeros_like(rows[:1]))


def child(module: nn.Module, name: str) -> nn.Module | None:
    """A module's own child of that name, or that of its decoder, as in OPT."""
    for owner in (module, getattr(module, "decoder", None)):
        found = getattr(owner, name, None)
        if isinstance(found, nn.Module):
            return found
    return None
