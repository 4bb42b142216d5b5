"""fastsae's own files: config.json and the state dict in sae.safetensors, as `SAE.save` writes."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae.config import from_dict
from fastsae.distributed.parallelize import parallelize, per_latent
from fastsae.files import (
    CHECKSUM,
    is_sealed,
    read_header,
    read_tensors,
    sealed,
    shown,
    temporary_of,
)
from fastsae.nn import SAE, ActivationConfig
from fastsae.nn.sae import FORMAT
from fastsae.sharded import read_rows
from fastsae.shards import Shards
from fastsae.version import written_by

from .checkpoint_io import Config, Tensors, read_file

SHAPE = {"skip": False, "layers": 1, "by_norm": False, "layer_norm": False}
"""Settings that an SAE of an older version may lack, with the values that it had."""


def read(config: Config, tensors: Tensors) -> SAE:
    """ValueError for another format, for unknown or missing settings and tensors, and for files
    that are not as they were saved."""
    if config.values.get("format") != FORMAT:
        raise ValueError(f"{config.path} is not the config of a {FORMAT} file")
    saved = saved_with(config, tensors)
    try:
        sae = build(config, saved or tensors)  # what is wrong there says more than a checksum
    except ValueError as error:
        raise ValueError(f"{error}{written_by(config.values.get('version'))}") from None
    if saved is None:
        raise ValueError(
            f"{tensors.path} or {config.path} was changed after it was saved: its checksum differs "
            f"(to use an edited config, remove version and {CHECKSUM} from it)"
        )
    return sae


def saved_with(config: Config, tensors: Tensors) -> Tensors | None:
    """The tensors that were saved with the settings, if they are there.

    A process that was killed while it replaced an SAE leaves them under a temporary name.
    """
    pending = temporary_of(tensors.path)
    if is_sealed(config.values, tensors.values):
        return tensors
    with suppress(ValueError):  # there is none, or it was not complete yet
        found = read_tensors(pending)
        if is_sealed(config.values, found):
            return Tensors(tensors.path, found)
    return None


def read_divided(folder: Path, shards: Shards) -> SAE:
    """An SAE of which each process of a mesh reads its own latents; ValueError as in `read`."""
    found, path = read_file(folder / "config.json"), folder / "sae.safetensors"
    assert isinstance(found, Config), "of a JSON file"
    if found.values.get("format") != FORMAT:
        raise ValueError(f"{found.path} is not the config of a {FORMAT} file")
    header = read_header(path)
    sizes = {name: torch.empty(entry.shape, device="meta") for name, entry in header.items()}
    sae = shell(found, Tensors(path, sizes))
    names = per_latent(sae)
    parallelize(sae, shards)
    tensors, contents = read_rows(path, names, shards)
    if not is_sealed(found.values, contents):
        raise ValueError(f"{path} or {found.path} was changed after it was saved")
    sae.load_state_dict(tensors, assign=True)  # in the dtype that was saved
    return sae.eval()


def build(config: Config, tensors: Tensors) -> SAE:
    sae = shell(config, tensors)
    sae.load_state_dict(tensors.values, assign=True)
    return sae.eval()


def shell(config: Config, tensors: Tensors) -> SAE:
    """The SAE without weights, on the meta device; ValueError unless the tensors are its."""
    known = {"format", "version", CHECKSUM, "d_in", "d_sae", "d_out", "activation", *SHAPE}
    if unknown := sorted(config.values.keys() - known):
        raise ValueError(f"{config.path} has no setting {shown(unknown[0])}")
    d_in, d_sae = config.take("d_in", int), config.take("d_sae", int)
    tensors.take("W_enc", d_sae, d_in)  # sizes are real before anything is built of them
    shape = {name: config.take(name, type(default), default) for name, default in SHAPE.items()}
    d_out = config.values.get("d_out")
    if d_out is not None:
        tensors.take("W_dec", d_sae, config.take("d_out", int))
    settings = config.values.get("activation")
    activation = from_dict(ActivationConfig, settings, f"{config.path}: activation").build()
    with torch.device("meta"):
        sae = SAE(d_in, d_sae, activation, d_out, **shape)
    wanted, found = shapes(sae.state_dict()), shapes(tensors.values)
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            one, two = (kind.get(name, "absent") for kind in (wanted, found))
            raise ValueError(f"{tensors.path}: {shown(name)} must be {one}, got {two}")
    return sae


def shapes(state: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in state.items()}


def write(sae: SAE) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors = sae.state_dict()
    return sealed(sae.config(), tensors), tensors
