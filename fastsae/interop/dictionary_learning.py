"""dictionary_learning: config.json and ae.pt, a state dict whose names depend on the class."""

from typing import Any

import torch
from torch import Tensor

from fastsae.files import shown
from fastsae.nn import SAE, BatchTopK, Gated, JumpReLU, ReLU, TopK
from fastsae.nn.batchtopk import UNSET

from .checkpoint_io import Config, Tensors, build_sae, exportable, read_transposed, shift_bias
from .inference_rule import Rule, require_rule, thresholds

Weights = tuple[Tensor, Tensor, Tensor, Tensor]
"""W_enc, b_enc, W_dec and b_dec."""

CLASSES = {
    "topk": "AutoEncoderTopK",
    "batchtopk": "BatchTopKSAE",
    "jumprelu": "JumpReluAutoEncoder",
    "relu": "AutoEncoder",
    "gated": "GatedAutoEncoder",
}
READABLE = (*CLASSES.values(), "AutoEncoderNew", "MatryoshkaBatchTopKSAE")
PLACEHOLDERS = {"layer": 0, "lm_name": "unknown"}
"""Settings that loaders of these files require and an SAE does not know."""

GATED = {"r_mag": "r_mag", "b_mag": "mag_bias"}


def read(config: Config, tensors: Tensors) -> SAE:
    """ValueError for other classes than READABLE.

    A Matryoshka SAE becomes its whole dictionary. A BatchTopK without a threshold keeps the largest
    pre-activations of a batch, where dictionary_learning would keep every positive one.
    """
    trainer = Config(config.path, config.values.get("trainer"))
    match name := trainer.values.get("dict_class"):
        case "JumpReluAutoEncoder":
            weights = read_transposed(tensors)
            state = {"threshold": tensors.take("threshold", len(weights[1]))}
            return build_sae(
                JumpReLU(l0_coef=0.0), *weights, activation_state=state, centered=False
            )
        case "AutoEncoderTopK":
            return build_sae(TopK(k_of(trainer, tensors)), *linear(tensors))
        case "BatchTopKSAE" | "MatryoshkaBatchTopKSAE":
            weights = linear(tensors) if name == "BatchTopKSAE" else read_transposed(tensors)
            known = "threshold" in tensors
            threshold = tensors.take("threshold").float() if known else torch.tensor(UNSET)
            activation = BatchTopK(k_of(trainer, tensors))
            return build_sae(activation, *weights, activation_state={"threshold": threshold})
        case "GatedAutoEncoder":
            weights = linear(tensors, "gate_bias", "decoder_bias")
            state = {our: tensors.take(their, len(weights[1])) for our, their in GATED.items()}
            return build_sae(Gated(l1_coef=0.0), *weights, activation_state=state)
        case "AutoEncoderNew":
            weights = linear(tensors, b_dec="decoder.bias")
            return build_sae(ReLU(l1_coef=0.0), *weights, centered=False)
        case "AutoEncoder":
            return build_sae(ReLU(l1_coef=0.0), *unit_rows(*linear(tensors, b_dec="bias")))
    supported = ", ".join(READABLE)
    raise ValueError(f"{config.path}: dict_class must be one of {supported}, got {shown(name)}")


def k_of(trainer: Config, tensors: Tensors) -> int:
    """k from the state dict, or in older files from the config."""
    if "k" not in tensors:
        return trainer.take("k", int)
    k = tensors.values["k"]
    if k.shape or k.is_floating_point():
        raise ValueError(f"{tensors.path}: k must be an integer, got {shown(k)}")
    return int(k)


def linear(tensors: Tensors, b_enc: str = "encoder.bias", b_dec: str = "b_dec") -> Weights:
    """The weights of a class whose encoder and decoder are each a torch.nn.Linear."""
    W_enc = tensors.take("encoder.weight", None, None)
    d_sae, d_in = W_enc.shape
    W_dec = tensors.take("decoder.weight", d_in, d_sae).T
    return W_enc, tensors.take(b_enc, d_sae), W_dec, tensors.take(b_dec, d_in)


def unit_rows(W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor) -> Weights:
    """The same ReLU SAE with unit decoder rows, which an AutoEncoder gets when it is loaded."""
    norm = W_dec.norm(dim=1)
    norm = norm.where(norm > 0, 1.0)
    return W_enc * norm[:, None], b_enc * norm, W_dec / norm[:, None], b_dec


def write(sae: SAE) -> tuple[dict[str, Any], dict[str, Tensor]]:
    sae = exportable(sae, "dictionary_learning")
    if sae.d_out is not None:
        raise ValueError("dictionary_learning does not support transcoders")
    rule = require_rule(
        sae, "dictionary_learning", "topk", "batchtopk", "jumprelu", "relu", "gated"
    )
    trainer = {"dict_class": CLASSES[rule.kind], "activation_dim": sae.d_in, "dict_size": sae.d_sae}
    trainer |= PLACEHOLDERS if rule.k is None else {"k": rule.k, **PLACEHOLDERS}
    return {"trainer": trainer, "buffer": {"ctx_len": 128}}, state_of(sae, rule)


def state_of(sae: SAE, rule: Rule) -> dict[str, Tensor]:
    """The state dict of the class."""
    if rule.kind == "jumprelu":  # its encoder sees x uncentered
        return {
            "W_enc": sae.W_enc.T,
            "b_enc": shift_bias(sae.b_enc, sae.W_enc, -sae.b_dec),
            "W_dec": sae.W_dec,
            "b_dec": sae.b_dec,
            "threshold": thresholds(rule, sae),
        }
    weights = sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec
    W_enc, b_enc, W_dec, b_dec = unit_rows(*weights) if rule.kind == "relu" else weights
    state = {"encoder.weight": W_enc, "decoder.weight": W_dec.T}
    if isinstance(sae.activation, Gated):
        gates = {their: getattr(sae.activation, our) for our, their in GATED.items()}
        return {**state, "decoder_bias": b_dec, "gate_bias": b_enc, **gates}
    state["encoder.bias"] = b_enc
    if rule.kind == "relu":
        return {**state, "bias": b_dec}
    unset = torch.tensor(UNSET)
    threshold = unset if rule.threshold is None else rule.threshold.float()
    k = torch.tensor(rule.k, dtype=torch.int)
    return {**state, "b_dec": b_dec, "k": k, "threshold": threshold}
