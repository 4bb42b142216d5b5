"""Gemma Scope (arXiv:2408.05147): JumpReLU SAEs in params.npz, whose encoder sees x as it is."""

from pathlib import Path

from fastsae.nn import SAE, JumpReLU

from .archives import read_npz
from .parts import Tensors, assembled, columns

NAME, FILES = "gemma_scope", ("params.npz",)


def read(folder: Path) -> SAE:
    """The SAE; ValueError for a damaged file."""
    tensors = Tensors(folder / FILES[0], read_npz(folder / FILES[0]))
    weights = columns(tensors)
    own = {"threshold": tensors.take("threshold", len(weights[1]))}
    return assembled(JumpReLU(l0_coef=0.0), *weights, own=own, centres=False)
