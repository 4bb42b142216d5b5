"""The logit lens: which next tokens a latent's decoder row promotes and suppresses."""

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from fastsae.data import StoredActivations
from fastsae.data.model import ModelFiles, load_causal
from fastsae.memory import available_memory
from fastsae.nn import SAE

from .contexts import number
from .text import Strings, TokenText

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EACH = 10
"""Tokens that are shown of each sign."""
LAST_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "embedding_norm")
"""What the normalization before the unembedding is called in models' code."""


class NoLens(ValueError):
    """Why there is no logit lens."""


@torch.no_grad()
def logit_lens(
    sae: SAE,
    latents: Int64[Tensor, " n"],
    data: StoredActivations,
    text: TokenText,
    strings: Strings,
    trust_remote_code: bool,
) -> list[dict[str, Any]]:
    """For each latent, the tokens whose logits its decoder row raises and lowers most.

    The row goes through the model's last normalization and its unembedding, without the layers
    between; logits are relative to their mean over the vocabulary. NoLens says why not.
    """
    model = causal_model(sae, data, trust_remote_code)
    head: Any = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.shape[1] != sae.W_dec.shape[1]:
        raise NoLens("the decoder rows do not have the width of the model's unembedding")
    rows = sae.W_dec.detach()[latents].to(weight)
    logits = through_norm(model, rows) @ weight.T
    logits -= logits.mean(1, keepdim=True)
    each = min(EACH, logits.shape[1])
    sides = {"promoted": logits.topk(each), "suppressed": logits.topk(each, largest=False)}
    found: list[dict[str, Any]] = [{} for _ in latents]
    for name, (values, tokens) in sides.items():
        for card, own, ids in zip(found, values.tolist(), tokens.tolist(), strict=True):
            pairs = zip(ids, own, strict=True)
            card[name] = [[strings.number(text[i]), number(v)] for i, v in pairs]
    return found


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
