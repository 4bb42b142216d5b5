"""EleutherAI's sparsify: cfg.json and sae.safetensors, with the encoder as a torch.nn.Linear."""

from typing import Any

from torch import Tensor

from fastsae.files import shown
from fastsae.nn import SAE, TopK

from .checkpoint_io import Config, Tensors, build_sae, exportable, shift_bias
from .inference_rule import require_rule


def read(config: Config, tensors: Tensors) -> SAE:
    """ValueError for the activation groupmax."""
    activation = config.values.get("activation", "topk")
    if activation != "topk":
        raise ValueError(f"{config.path}: activation must be topk, got {shown(activation)}")
    d_in, k = config.take("d_in", int), config.take("k", int)
    transcoder = config.take("transcode", bool, False)
    skip = config.take("skip_connection", bool, False)
    d_sae = config.take("num_latents", int, 0) or d_in * config.take("expansion_factor", int, 32)
    W_enc, b_enc = tensors.take("encoder.weight", d_sae, d_in), tensors.take("encoder.bias", d_sae)
    b_dec = tensors.take("b_dec", d_in)
    if skip and not transcoder:  # x is centered for the encoder, not for the skip connection
        b_enc = shift_bias(b_enc, W_enc, -b_dec)
    return build_sae(
        TopK(k),
        W_enc,
        b_enc,
        tensors.take("W_dec", d_sae, d_in),
        b_dec,
        transcoder=transcoder or skip,
        W_skip=tensors.take("W_skip", d_in, d_in) if skip else None,
    )


def write(sae: SAE) -> tuple[dict[str, Any], dict[str, Tensor]]:
    sae = exportable(sae, "sparsify")
    rule = require_rule(sae, "sparsify", "topk")
    if sae.d_out not in (None, sae.d_in):
        raise ValueError(
            f"sparsify supports transcoders with d_out = d_in only, got {sae.d_out} and {sae.d_in}"
        )
    tensors: dict[str, Tensor] = {
        "encoder.weight": sae.W_enc,
        "encoder.bias": sae.b_enc,
        "W_dec": sae.W_dec,
        "b_dec": sae.b_dec,
    }
    tensors |= {} if sae.W_skip is None else {"W_skip": sae.W_skip}
    config = {
        "activation": "topk",
        "expansion_factor": max(1, sae.d_sae // sae.d_in),
        "normalize_decoder": True,
        "num_latents": sae.d_sae,
        "k": rule.k,
        "multi_topk": False,
        "skip_connection": sae.W_skip is not None,
        "transcode": sae.d_out is not None,
        "d_in": sae.d_in,
    }
    return config, tensors
