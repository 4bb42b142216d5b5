"""fastsae's own files: config.json and the state dict in sae.safetensors, as `SAE.save` writes."""

from typing import Any

import torch
from torch import Tensor

from fastsae.config import from_dict
from fastsae.nn import SAE, ActivationConfig
from fastsae.nn.sae import FORMAT

from .checkpoint_io import Config, Tensors

SIZES, FLAGS = ("d_in", "d_sae", "layers"), ("skip", "by_norm", "layer_norm")


def read(config: Config, tensors: Tensors) -> SAE:
    """ValueError for another format, and for unknown or missing settings and tensors."""
    if config.values.pop("format", None) != FORMAT:
        raise ValueError(f"{config.path} is not the config of a {FORMAT} file")
    config.values.setdefault("layer_norm", False)  # older files do not name it
    if unknown := config.values.keys() ^ {*SIZES, *FLAGS, "d_out", "activation"}:
        raise ValueError(f"{config.path}: unknown or missing {sorted(unknown)}")
    shape = {name: config.take(name, int) for name in SIZES}
    shape |= {name: config.take(name, bool) for name in FLAGS}
    d_out = None if config.values["d_out"] is None else config.take("d_out", int)
    activation = from_dict(ActivationConfig, config.values["activation"], "activation").build()
    with torch.device("meta"):
        sae = SAE(activation=activation, d_out=d_out, **shape)
    wanted, found = shapes(sae.state_dict()), shapes(tensors.values)
    if wanted != found:
        raise ValueError(f"{tensors.path} must hold {wanted}, got {found}")
    sae.load_state_dict(tensors.values, assign=True)
    return sae.eval()


def shapes(state: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in state.items()}


def write(sae: SAE) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return sae.config(), sae.state_dict()
