"""OpenAI's sparse_autoencoder (arXiv:2406.04093): one state dict in a file of any name.

Their SAEs with TopK normalise each token; those with ReLU do not.
"""

from pathlib import Path
from typing import Any

from fastsae.nn import SAE, Activation, ReLU, TopK

from .archives import read_pt
from .parts import Tensors, assembled, setting


def read(path: Path) -> SAE:
    """The SAE; ValueError for a damaged file or another activation than ReLU and TopK."""
    found = read_pt(path)
    tensors = Tensors(path, found)
    W_enc = tensors.take("encoder.weight", None, None)
    d_sae, d_in = W_enc.shape
    activation = activation_of(found, path)
    return assembled(
        activation,
        W_enc,
        tensors.take("latent_bias", d_sae),
        tensors.take("decoder.weight", d_in, d_sae).T,
        tensors.take("pre_bias", d_in),
        layer_norm=isinstance(activation, TopK),
    )


def activation_of(found: dict[str, Any], path: Path) -> Activation:
    """The activation that a state dict names; ValueError for one that is not here."""
    name = found.get("activation", "ReLU")
    if name == "ReLU":
        return ReLU(l1_coef=0.0)
    if name != "TopK":
        raise ValueError(f"{path}: activation must be ReLU or TopK, got {name!r}")
    own = found.get("activation_state_dict")
    if not isinstance(own, dict) or own.get("postact_fn") != "ReLU":
        raise ValueError(f"{path}: a TopK must have k and postact_fn 'ReLU', got {own!r}")
    return TopK(setting(own, "k", int, path))
