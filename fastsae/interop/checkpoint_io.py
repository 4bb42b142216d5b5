"""Contents of SAE files, checked as they are read, and an SAE built from them."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae.files import read_json, read_npz, read_pt, read_tensors, shown
from fastsae.nn import SAE, Activation

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


class Config:
    """The settings in a JSON object, type-checked when read; a ValueError names the file."""

    def __init__(self, path: Path, values: Any):
        if not isinstance(values, dict):
            raise ValueError(f"{path} must hold a JSON object")
        self.path, self.values = path, values

    def take(self, name: str, kind: type, default: Any = None) -> Any:
        """A setting of that type; ValueError if it is missing or of another type."""
        value = self.values.get(name, default)
        if kind is float and type(value) is int and abs(value) < 2**53:
            value = float(value)
        if type(value) is not kind:
            wanted = f"{name} must be of type {kind.__name__}"
            raise ValueError(f"{self.path}: {wanted}, got {shown(value)}")
        return value


class Tensors:
    """The tensors of a file by name, each checked when taken; a ValueError names the file."""

    def __init__(self, path: Path, values: dict[str, Any]):
        self.path, self.values = path, values

    def __contains__(self, name: str) -> bool:
        return isinstance(self.values.get(name), Tensor)

    def take(self, name: str, *shape: int | None) -> Tensor:
        """A floating-point tensor of that shape, in which None is any size."""
        if name not in self:
            held = sorted(filter(self.__contains__, self.values))
            raise ValueError(f"{self.path} lacks {name}: it holds {shown(held)}")
        found = self.values[name]
        if len(found.shape) != len(shape) or any(
            want not in (None, size) for want, size in zip(shape, found.shape, strict=True)
        ):
            wanted = ["any" if size is None else size for size in shape]
            raise ValueError(f"{self.path}: {name} must be {wanted}, got {list(found.shape)}")
        if found.dtype not in DTYPES.values():
            raise ValueError(f"{self.path}: {name} must be floating point, got {found.dtype}")
        return found


def read_file(path: Path) -> Config | Tensors:
    if path.suffix == ".json":
        return Config(path, read_json(path))
    readers = {".safetensors": read_tensors, ".npz": read_npz, ".pt": read_pt}
    return Tensors(path, readers[path.suffix](path))


def build_sae(
    activation: Activation,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    *,
    centered: bool = True,
    transcoder: bool = False,
    W_skip: Tensor | None = None,
    by_norm: bool = False,
    layer_norm: bool = False,
    activation_state: Mapping[str, Tensor] | None = None,
) -> SAE:
    """An SAE in evaluation mode with these weights; ValueError if the sizes do not fit.

    Args:
        W_enc, W_dec: [d_sae, d_in] and [d_sae, d_out], one row per latent.
        centered: whether the encoder sees x - b_dec; if not, an autoencoder's b_enc is shifted.
        activation_state: the activation's parameters and buffers by name.
    """
    d_sae, d_in = W_enc.shape
    with torch.device("meta"):
        sae = SAE(
            d_in,
            d_sae,
            activation,
            W_dec.shape[1] if transcoder else None,
            skip=W_skip is not None,
            by_norm=by_norm,
            layer_norm=layer_norm,
        )
    if not centered and not transcoder:
        b_enc = shift_bias(b_enc, W_enc, b_dec)
    state = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    state |= {} if W_skip is None else {"W_skip": W_skip}
    state |= {f"activation.{name}": value for name, value in (activation_state or {}).items()}
    for name, value in sae.state_dict().items():
        if name == "activation.coefficient.value":  # only used in training
            state[name] = torch.zeros(value.shape, dtype=value.dtype)
    dtype = W_enc.dtype
    weights = dict(sae.named_parameters())
    state = {n: t.to(dtype if n in weights else t.dtype).contiguous() for n, t in state.items()}
    sae.load_state_dict(state, assign=True)
    return sae.eval()


def read_transposed(tensors: Tensors) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W_enc, b_enc, W_dec and b_dec from a file that stores W_enc as [d_in, d_sae]."""
    W_enc = tensors.take("W_enc", None, None).T
    d_sae, d_in = W_enc.shape
    b_enc, W_dec = tensors.take("b_enc", d_sae), tensors.take("W_dec", d_sae, d_in)
    return W_enc, b_enc, W_dec, tensors.take("b_dec", d_in)


def shift_bias(b_enc: Tensor, W_enc: Tensor, shift: Tensor) -> Tensor:
    """The bias with which an encoder of x - shift does what W_enc x + b_enc does."""
    return (b_enc.double() + W_enc.double() @ shift.double()).to(b_enc.dtype)


def exportable(sae: SAE, form: str, *, layer_norm: bool = False) -> SAE:
    """The SAE on the CPU, with decoder norms folded into the weights, to be read only; ValueError
    for a crosscoder, and for an SAE with layer_norm unless the format supports that."""
    if sae.layers > 1:
        raise ValueError(f"{form} does not support crosscoders")
    if sae.layer_norm and not layer_norm:
        raise ValueError(f"{form} does not support layer_norm")
    if not (sae.by_norm or sae.training) and sae.W_enc.device.type == "cpu":
        return sae  # a copy would add its size to the peak memory of a run
    sae = copy.deepcopy(sae).cpu().eval()
    sae.fold_decoder_norms_()
    return sae
