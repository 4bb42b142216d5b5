"""Which latents are active at inference, in terms that other libraries share."""

from typing import Literal, NamedTuple

from torch import Tensor

from fastsae.nn import SAE, BatchTopK, Gated, JumpReLU, ReLU, TopK, Variational

Kind = Literal["topk", "abstopk", "batchtopk", "jumprelu", "relu", "gated"]


class Rule(NamedTuple):
    """What an activation computes outside training."""

    kind: Kind
    k: int | None = None
    threshold: Tensor | None = None
    """Per latent [d_sae], or one for all [] with batchtopk."""


def rule_of(sae: SAE) -> Rule:
    """ValueError for an activation that other libraries do not support."""
    match activation := sae.activation:
        case TopK() if not activation.cfg.corrections:
            return Rule("abstopk" if activation.signed else "topk", activation.cfg.k)
        case Variational():  # at inference it adds no noise
            return Rule("topk", activation.cfg.k)
        case BatchTopK() if not activation.signed and activation.threshold >= 0:
            return Rule("batchtopk", activation.cfg.k, activation.threshold)
        case JumpReLU():
            return Rule("jumprelu", threshold=activation.threshold.detach().clamp(min=0))
        case ReLU():
            return Rule("relu")
        case Gated():
            return Rule("gated")
        case TopK():
            which = " with corrections"
        case BatchTopK():
            which = " that ranks magnitudes" if activation.signed else " that has no threshold yet"
        case _:
            which = ""
    raise ValueError(f"no other library's format supports {activation.cfg.name}{which}")


def require_rule(sae: SAE, form: str, *kinds: Kind) -> Rule:
    """The rule, if it is of one of these kinds, which the format supports; otherwise ValueError."""
    rule = rule_of(sae)
    if rule.kind not in kinds:
        raise ValueError(f"{form} supports {', '.join(kinds)}, not {rule.kind}")
    return rule


def thresholds(rule: Rule, sae: SAE) -> Tensor:
    """One threshold per latent, in the dtype of the weights."""
    assert rule.threshold is not None
    return rule.threshold.expand(sae.d_sae).clone().to(sae.W_enc.dtype)
