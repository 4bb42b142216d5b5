"""Gemma Scope 2: JumpReLU SAEs and transcoders of Gemma 3, in config.json and params.safetensors.

The encoder sees x uncentered. The skip connection is x @ affine_skip_connection.
"""

from fastsae.files import shown
from fastsae.nn import SAE, JumpReLU

from .checkpoint_io import Config, Tensors, build_sae

KINDS = {"sae": False, "transcoder": True}
"""The types that are read, and whether they are transcoders."""


def read(config: Config, tensors: Tensors) -> SAE:
    """ValueError for crosscoders, cross-layer transcoders and other activations."""
    kind, architecture = config.take("type", str, "sae"), config.take("architecture", str)
    if kind not in KINDS:
        raise ValueError(
            f"{config.path}: type must be one of {', '.join(KINDS)}, got {shown(kind)}"
        )
    if architecture != "jump_relu":
        raise ValueError(
            f"{config.path}: architecture must be jump_relu, got {shown(architecture)}"
        )
    W_enc = tensors.take("w_enc", None, config.take("width", int)).T
    d_sae, d_in = W_enc.shape
    W_dec = tensors.take("w_dec", d_sae, None)
    d_out = W_dec.shape[1]
    skip = None
    if config.take("affine_connection", bool, False):
        skip = tensors.take("affine_skip_connection", d_in, d_out).T
    return build_sae(
        JumpReLU(l0_coef=0.0),
        W_enc,
        tensors.take("b_enc", d_sae),
        W_dec if KINDS[kind] else tensors.take("w_dec", d_sae, d_in),
        tensors.take("b_dec", d_out),
        centered=False,
        transcoder=KINDS[kind],
        W_skip=skip,
        activation_state={"threshold": tensors.take("threshold", d_sae)},
    )
