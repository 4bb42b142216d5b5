"""Which latents of a trained SAE are active, in the words that other libraries have for it."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastsae.nn import SAE
from fastsae.nn.batchtopk import BatchTopK
from fastsae.nn.gated import Gated
from fastsae.nn.jumprelu import JumpReLU
from fastsae.nn.relu import ReLU
from fastsae.nn.topk import TopK
from fastsae.nn.variational import Variational

Kind = Literal["topk", "abstopk", "batchtopk", "jumprelu", "relu", "gated"]


class Rule(NamedTuple):
    """What an activation does outside training."""

    kind: Kind
    k: int | None = None
    threshold: Tensor | None = None
    """Of each latent, or of all ([]) with batchtopk."""


def rule_of(sae: SAE) -> Rule:
    """ValueError for an activation that no other library has."""
    activation = sae.activation
    match activation:
        case TopK():
            return Rule("abstopk" if activation.signed else "topk", activation.cfg.k)
        case Variational():  # without its noise
            return Rule("topk", activation.cfg.k)
        case BatchTopK() if not activation.signed and activation.threshold >= 0:
            return Rule("batchtopk", activation.cfg.k, activation.threshold)
        case JumpReLU():
            return Rule("jumprelu", threshold=activation.threshold.detach().clamp(min=0))
        case ReLU():
            return Rule("relu")
        case Gated():
            return Rule("gated")
    why = "has no threshold yet" if isinstance(activation, BatchTopK) else "is fastsae's own"
    if isinstance(activation, BatchTopK) and activation.signed:
        why = "keeps signs, which none ranks over a batch"
    raise ValueError(f"{activation.cfg.name} {why}: no other library's files can hold it")


def expressed(sae: SAE, form: str, *kinds: Kind) -> Rule:
    """The rule, if it is one of those that a format has; ValueError says which ones it has."""
    rule = rule_of(sae)
    if rule.kind not in kinds:
        raise ValueError(f"{form} holds {', '.join(kinds)}, not {rule.kind}")
    return rule


def thresholds(rule: Rule, d_sae: int) -> Tensor:
    """One for each latent."""
    assert rule.threshold is not None
    return torch.broadcast_to(rule.threshold, (d_sae,)).clone()
