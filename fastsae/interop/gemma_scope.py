"""Gemma Scope (arXiv:2408.05147): JumpReLU SAEs in params.npz; the encoder sees x uncentered."""

from fastsae.nn import SAE, JumpReLU

from .checkpoint_io import Tensors, build_sae, read_transposed


def read(tensors: Tensors) -> SAE:
    weights = read_transposed(tensors)
    state = {"threshold": tensors.take("threshold", len(weights[1]))}
    return build_sae(JumpReLU(l0_coef=0.0), *weights, activation_state=state, centered=False)
