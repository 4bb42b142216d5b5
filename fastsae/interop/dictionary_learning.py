"""dictionary_learning: config.json beside ae.pt, a state dict whose names depend on the class."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae.files import read_json, write_atomically, write_json
from fastsae.nn import SAE, BatchTopK, Gated, JumpReLU, ReLU, TopK

from .archives import read_pt
from .parts import MOST_JSON, Tensors, assembled, moved, plain, setting
from .rules import Rule, expressed, thresholds

NAME, FILES = "dictionary_learning", ("config.json", "ae.pt")
CLASSES = {
    "topk": "AutoEncoderTopK",
    "batchtopk": "BatchTopKSAE",
    "jumprelu": "JumpReluAutoEncoder",
    "relu": "AutoEncoder",
    "gated": "GatedAutoEncoder",
}
READ = (*CLASSES.values(), "AutoEncoderNew", "MatryoshkaBatchTopKSAE")


def read(folder: Path) -> SAE:
    """The SAE; ValueError for a damaged file or another class.

    A Matryoshka is its whole dictionary. A BatchTopK without a threshold yet takes the largest of
    a batch, where dictionary_learning would take every positive latent.
    """
    path = folder / FILES[0]
    config = read_json(path, MOST_JSON)
    trainer = config.get("trainer") if isinstance(config, dict) else None
    if not isinstance(trainer, dict):
        raise ValueError(f"{path} must hold a JSON object with a trainer")
    name = trainer.get("dict_class")
    if name not in READ:
        raise ValueError(f"{path}: dict_class must be one of {', '.join(READ)}, got {name!r}")
    tensors = Tensors(folder / FILES[1], read_pt(folder / FILES[1]))
    if name in ("AutoEncoderTopK", "BatchTopKSAE"):
        own, k = {}, k_of(tensors, trainer, path)
        activation = TopK(k) if name == "AutoEncoderTopK" else BatchTopK(k)
        if name == "BatchTopKSAE" and "threshold" in tensors:
            own["threshold"] = tensors.take("threshold").float()
        weights = *linear(tensors, "encoder.bias"), tensors.take("b_dec", None)
        return assembled(activation, *weights, own=own)
    if name == "MatryoshkaBatchTopKSAE":
        activation, own = BatchTopK(k_of(tensors, trainer, path)), {}
        own["threshold"] = tensors.take("threshold").float()
        return assembled(activation, *columns(tensors), own=own)
    if name == "JumpReluAutoEncoder":
        weights = columns(tensors)
        own = {"threshold": tensors.take("threshold", len(weights[1]))}
        return assembled(JumpReLU(l0_coef=0.0), *weights, own=own, centres=False)
    if name == "GatedAutoEncoder":
        weights = *linear(tensors, "gate_bias"), tensors.take("decoder_bias", None)
        own = {ours: tensors.take(theirs, None) for ours, theirs in GATED.items()}
        return assembled(Gated(l1_coef=0.0), *weights, own=own)
    centres = name == "AutoEncoder"
    b_dec = tensors.take("bias" if centres else "decoder.bias", None)
    weights = *linear(tensors, "encoder.bias"), b_dec
    return assembled(ReLU(l1_coef=0.0), *weights, centres=centres)


GATED = {"r_mag": "r_mag", "b_mag": "mag_bias"}


def k_of(tensors: Tensors, trainer: dict[str, Any], path: Path) -> int:
    """Of the state dict, or in older files of the config."""
    return int(tensors.tensors["k"]) if "k" in tensors else setting(trainer, "k", int, path)


def linear(tensors: Tensors, bias: str) -> tuple[Tensor, Tensor, Tensor]:
    """W_enc, b_enc and W_dec, from the weights of two torch.nn.Linear."""
    W_enc = tensors.take("encoder.weight", None, None)
    d_sae, d_in = W_enc.shape
    return W_enc, tensors.take(bias, d_sae), tensors.take("decoder.weight", d_in, d_sae).T


def columns(tensors: Tensors) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W_enc, b_enc, W_dec and b_dec, where W_enc has a column for each latent."""
    W_enc = tensors.take("W_enc", None, None).T
    d_sae, d_in = W_enc.shape
    b_enc, W_dec = tensors.take("b_enc", d_sae), tensors.take("W_dec", d_sae, d_in)
    return W_enc, b_enc, W_dec, tensors.take("b_dec", d_in)


def write(sae: SAE, folder: Path, metadata: dict[str, Any] | None = None) -> None:
    """ValueError for an SAE that dictionary_learning has not, with the reason."""
    sae = plain(sae, NAME)
    if sae.d_out is not None:
        raise ValueError("dictionary_learning has no transcoders")
    rule = expressed(sae, NAME, "topk", "batchtopk", "jumprelu", "relu", "gated")
    about = {"layer": 0, "lm_name": "unknown", **(metadata or {})}
    trainer = {
        "dict_class": CLASSES[rule.kind],
        "activation_dim": sae.d_in,
        "dict_size": sae.d_sae,
        **({} if rule.k is None else {"k": rule.k}),
        **about,
    }
    folder.mkdir(parents=True, exist_ok=True)
    state = {n: t.detach().clone().contiguous() for n, t in state_of(sae, rule).items()}
    write_atomically(folder / FILES[1], lambda path: torch.save(state, path))
    write_json(folder / FILES[0], {"trainer": trainer, "buffer": {"ctx_len": 128}})


def state_of(sae: SAE, rule: Rule) -> dict[str, Tensor]:
    """The state dict of the class."""
    if rule.kind == "jumprelu":  # whose encoder sees x as it is
        return {
            "W_enc": sae.W_enc.T,
            "b_enc": moved(sae.b_enc, sae.W_enc, -sae.b_dec),
            "W_dec": sae.W_dec,
            "b_dec": sae.b_dec,
            "threshold": thresholds(rule, sae.d_sae).to(sae.W_enc.dtype),
        }
    state = {"encoder.weight": sae.W_enc, "decoder.weight": sae.W_dec.T}
    if isinstance(sae.activation, Gated):
        own = {theirs: getattr(sae.activation, ours) for ours, theirs in GATED.items()}
        return {**state, "decoder_bias": sae.b_dec, "gate_bias": sae.b_enc, **own}
    state["encoder.bias"] = sae.b_enc
    if rule.kind == "relu":
        return {**state, "bias": sae.b_dec}
    unset = torch.tensor(-1.0)
    threshold = unset if rule.threshold is None else rule.threshold.float()
    k = torch.tensor(rule.k, dtype=torch.int)
    return {**state, "b_dec": sae.b_dec, "k": k, "threshold": threshold}
