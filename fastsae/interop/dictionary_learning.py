"""dictionary_learning: config.json beside ae.pt, a state dict whose names depend on the class."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae.files import read_json, write_atomically, write_json
from fastsae.nn import SAE, BatchTopK, Gated, JumpReLU, ReLU, TopK
from fastsae.nn.batchtopk import UNSET

from .archives import read_pt
from .parts import MOST_JSON, Tensors, assembled, columns, moved, object_in, plain, setting
from .rules import Rule, expressed, thresholds

NAME, FILES = "dictionary_learning", ("config.json", "ae.pt")
CLASSES = {
    "topk": "AutoEncoderTopK",
    "batchtopk": "BatchTopKSAE",
    "jumprelu": "JumpReluAutoEncoder",
    "relu": "AutoEncoder",
    "gated": "GatedAutoEncoder",
}
ASKED_FOR = {"trainer": {"layer": 0, "lm_name": "unknown"}, "buffer": {"ctx_len": 128}}
"""What loaders of these files ask for and an SAE does not know: it has no meaning."""

READ = (*CLASSES.values(), "AutoEncoderNew", "MatryoshkaBatchTopKSAE")


def read(folder: Path) -> SAE:
    """The SAE; ValueError for a damaged file or another class.

    A Matryoshka is its whole dictionary. A BatchTopK without a threshold yet takes the largest of
    a batch, where dictionary_learning would take every positive latent.
    """
    path = folder / FILES[0]
    trainer = object_in(object_in(read_json(path, MOST_JSON), path).get("trainer"), path)
    name = trainer.get("dict_class")
    if name not in READ:
        raise ValueError(f"{path}: dict_class must be one of {', '.join(READ)}, got {name!r}")
    tensors = Tensors(folder / FILES[1], read_pt(folder / FILES[1]))
    if name == "JumpReluAutoEncoder":
        weights = columns(tensors)
        own = {"threshold": tensors.take("threshold", len(weights[1]))}
        return assembled(JumpReLU(l0_coef=0.0), *weights, own=own, centres=False)
    if name == "AutoEncoderTopK":
        return assembled(TopK(k_of(tensors, trainer, path)), *linear(tensors))
    if name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        weights = linear(tensors) if name == "BatchTopKSAE" else columns(tensors)
        known = "threshold" in tensors
        own = {"threshold": tensors.take("threshold").float() if known else torch.tensor(UNSET)}
        return assembled(BatchTopK(k_of(tensors, trainer, path)), *weights, own=own)
    if name == "GatedAutoEncoder":
        weights = linear(tensors, "gate_bias", "decoder_bias")
        own = {our: tensors.take(their, len(weights[1])) for our, their in GATED.items()}
        return assembled(Gated(l1_coef=0.0), *weights, own=own)
    if name == "AutoEncoderNew":
        weights = linear(tensors, b_dec="decoder.bias")
        return assembled(ReLU(l1_coef=0.0), *weights, centres=False)
    return assembled(ReLU(l1_coef=0.0), *unit_rows(*linear(tensors, b_dec="bias")))


GATED = {"r_mag": "r_mag", "b_mag": "mag_bias"}


def k_of(tensors: Tensors, trainer: dict[str, Any], path: Path) -> int:
    """Of the state dict, or in older files of the config."""
    if "k" not in tensors:
        return setting(trainer, "k", int, path)
    k = tensors.tensors["k"]
    if k.shape or k.is_floating_point():
        raise ValueError(f"{tensors.path}: k must be a whole number, got {k}")
    return int(k)


def linear(
    tensors: Tensors, b_enc: str = "encoder.bias", b_dec: str = "b_dec"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W_enc, b_enc, W_dec and b_dec, where both weights are those of a torch.nn.Linear."""
    W_enc = tensors.take("encoder.weight", None, None)
    d_sae, d_in = W_enc.shape
    W_dec = tensors.take("decoder.weight", d_in, d_sae).T
    return W_enc, tensors.take(b_enc, d_sae), W_dec, tensors.take(b_dec, d_in)


def unit_rows(
    W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same ReLU SAE with decoder rows of norm 1, which an AutoEncoder has once it is loaded."""
    norm = W_dec.norm(dim=1)
    norm = norm.where(norm > 0, 1.0)
    return W_enc * norm[:, None], b_enc * norm, W_dec / norm[:, None], b_dec


def write(sae: SAE, folder: Path) -> None:
    """ValueError for an SAE that dictionary_learning has not, with the reason."""
    sae = plain(sae, NAME)
    if sae.d_out is not None:
        raise ValueError("dictionary_learning has no transcoders")
    rule = expressed(sae, NAME, "topk", "batchtopk", "jumprelu", "relu", "gated")
    trainer = {
        "dict_class": CLASSES[rule.kind],
        "activation_dim": sae.d_in,
        "dict_size": sae.d_sae,
        **({} if rule.k is None else {"k": rule.k}),
        **ASKED_FOR["trainer"],
    }
    folder.mkdir(parents=True, exist_ok=True)
    state = {n: t.detach().clone().contiguous() for n, t in state_of(sae, rule).items()}
    write_atomically(folder / FILES[1], lambda path: torch.save(state, path))
    write_json(folder / FILES[0], {"trainer": trainer, "buffer": ASKED_FOR["buffer"]})


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
    weights = sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec
    W_enc, b_enc, W_dec, b_dec = unit_rows(*weights) if rule.kind == "relu" else weights
    state = {"encoder.weight": W_enc, "decoder.weight": W_dec.T}
    if isinstance(sae.activation, Gated):
        own = {theirs: getattr(sae.activation, ours) for ours, theirs in GATED.items()}
        return {**state, "decoder_bias": b_dec, "gate_bias": b_enc, **own}
    state["encoder.bias"] = b_enc
    if rule.kind == "relu":
        return {**state, "bias": b_dec}
    unset = torch.tensor(UNSET)
    threshold = unset if rule.threshold is None else rule.threshold.float()
    k = torch.tensor(rule.k, dtype=torch.int)
    return {**state, "b_dec": b_dec, "k": k, "threshold": threshold}
