"""What every format needs: an SAE from a file's tensors, and the plain form of one to write."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae.nn import SAE, Activation

MOST_JSON = 1 << 20
"""Bytes of a config that are read at most."""

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


class Tensors:
    """The tensors of a file by name, each checked as it is asked for; ValueError names the file."""

    def __init__(self, path: Path, found: Mapping[str, Any]):
        self.path = path
        self.tensors = {name: t for name, t in found.items() if isinstance(t, Tensor)}

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def take(self, name: str, *shape: int | None) -> Tensor:
        """A floating tensor of that shape, in which None is any size."""
        found = self.tensors.get(name)
        if found is None:
            raise ValueError(f"{self.path} lacks {name}: it holds {sorted(self.tensors)}")
        fits = len(found.shape) == len(shape) and all(
            want in (None, size) for want, size in zip(shape, found.shape, strict=True)
        )
        if not fits:
            wanted = ["any" if size is None else size for size in shape]
            raise ValueError(f"{self.path}: {name} must be {wanted}, got {list(found.shape)}")
        if found.dtype not in DTYPES.values():
            raise ValueError(f"{self.path}: {name} must be floating point, got {found.dtype}")
        return found


def object_in(config: Any, path: Path) -> dict[str, Any]:
    """A config that is a JSON object; ValueError for another value."""
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return config


def setting(
    config: Mapping[str, Any], name: str, kind: type, path: Path, default: Any = None
) -> Any:
    """A value of a config; ValueError for one that is missing or of another type."""
    value = config.get(name, default)
    if kind is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if type(value) is not kind:
        raise ValueError(f"{path}: {name} must be of type {kind.__name__}, got {value!r}")
    return value


def assembled(
    activation: Activation,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    *,
    centres: bool = True,
    transcodes: bool = False,
    W_skip: Tensor | None = None,
    by_norm: bool = False,
    layer_norm: bool = False,
    own: Mapping[str, Tensor] | None = None,
) -> SAE:
    """An SAE in evaluation mode of these tensors, W_enc and W_dec with a row for each latent.

    centres: the encoder sees x - b_dec; else, in an autoencoder, b_enc takes on what that changes.
    own: the activation's parameters and buffers by their names. ValueError if sizes do not fit.
    """
    d_sae, d_in = W_enc.shape
    with torch.device("meta"):
        sae = SAE(
            d_in,
            d_sae,
            activation,
            W_dec.shape[1] if transcodes else None,
            skip=W_skip is not None,
            by_norm=by_norm,
            layer_norm=layer_norm,
        )
    if not centres and not transcodes:
        b_enc = moved(b_enc, W_enc, b_dec)
    state = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    state |= {} if W_skip is None else {"W_skip": W_skip}
    state |= {f"activation.{name}": value for name, value in (own or {}).items()}
    for name, value in sae.state_dict().items():
        if name == "activation.coefficient.value":  # of training alone
            state[name] = torch.zeros(value.shape, dtype=value.dtype)
    dtype = W_enc.dtype
    weights = dict(sae.named_parameters())
    state = {n: t.to(dtype if n in weights else t.dtype).contiguous() for n, t in state.items()}
    sae.load_state_dict(state, assign=True)
    return sae.eval()


def columns(tensors: Tensors) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W_enc, b_enc, W_dec and b_dec of a file where W_enc has a column for each latent."""
    W_enc = tensors.take("W_enc", None, None).T
    d_sae, d_in = W_enc.shape
    b_enc, W_dec = tensors.take("b_enc", d_sae), tensors.take("W_dec", d_sae, d_in)
    return W_enc, b_enc, W_dec, tensors.take("b_dec", d_in)


def moved(b_enc: Tensor, W_enc: Tensor, by: Tensor) -> Tensor:
    """b_enc for an encoder that sees x - by, from the one for x."""
    return (b_enc.double() + W_enc.double() @ by.double()).to(b_enc.dtype)


def plain(sae: SAE, form: str, *, layer_norm: bool = False) -> SAE:
    """A copy on the CPU, its codes those of its weights alone; ValueError for a crosscoder, and
    with layer_norm unless the form has that."""
    if sae.layers > 1:
        raise ValueError(f"{form} has no crosscoders")
    if sae.layer_norm and not layer_norm:
        raise ValueError(f"{form} has no SAEs with layer_norm")
    sae = copy.deepcopy(sae).cpu().eval()
    sae.fold_decoder_norms_()
    return sae
