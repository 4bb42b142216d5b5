"""llamascopium (formerly lm-saes), which trains Llama Scope's successors: config.json and
sae_weights.safetensors, with W_E stored as [d_model, d_sae]; the encoder sees x uncentered.

An SAE of activations that were scaled to a mean norm of sqrt(d_model) becomes one of activations as
they are, as its own `standardize_parameters_of_dataset_norm` does.
"""

import math
from typing import Any

import torch
from torch import Tensor

from fastsae.files import shown
from fastsae.nn import SAE, Activation, BatchTopK, JumpReLU, ReLU, TopK
from fastsae.nn.batchtopk import UNSET

from .checkpoint_io import Config, Tensors, build_sae, exportable, shift_bias
from .inference_rule import Rule, require_rule, thresholds

ACTIVATIONS = "relu", "jumprelu", "topk", "batchtopk"
LOG_THRESHOLD = "activation_function.log_jumprelu_threshold"
UNKNOWN = "unknown"
"""A hook point that an SAE does not know, where the config needs one."""


def read(config: Config, tensors: Tensors) -> SAE:
    """ValueError for other sparse dictionaries than SAEs and transcoders, for a gated linear
    encoder, and for activations that are normalized per token or batch.

    With sparsity_include_decoder_norm, a top-k selects by codes times the norms of their decoder
    rows; the codes here are those products.
    """
    require(config, "sae_type", "sae", ("sae",))
    require(config, "use_glu_encoder", False, (False,))
    norms = require(config, "norm_activation", "dataset-wise", ("dataset-wise", "inference"))
    kind = require(config, "act_fn", "relu", ACTIVATIONS)
    W_enc = tensors.take("W_E", config.take("d_model", int), None).T
    d_sae, d_in = W_enc.shape
    W_dec, by_norm = tensors.take("W_D", d_sae, d_in), False
    activation, state = activation_of(kind, d_sae, config, tensors)
    if config.take("sparsity_include_decoder_norm", bool, True):
        by_norm = "topk" in kind
        if "threshold" in state and kind == "jumprelu":
            norm = W_dec.norm(dim=1)
            state["threshold"] = state["threshold"] / norm.where(norm > 0, 1.0)
    bias = config.take("use_decoder_bias", bool, True)
    hooks = [config.take(f"hook_point_{end}", str) for end in ("in", "out")]
    sae = build_sae(
        activation,
        W_enc,
        tensors.take("b_E", d_sae),
        W_dec,
        tensors.take("b_D", d_in) if bias else W_dec.new_zeros(d_in),
        centered=False,
        transcoder=hooks[0] != hooks[1],
        by_norm=by_norm,
        activation_state=state,
    )
    if norms == "dataset-wise":
        sae.fold_scale_(*(scale_at(hook, d_in, tensors) for hook in hooks))
    return sae


def require(config: Config, name: str, default: Any, allowed: tuple[Any, ...]) -> Any:
    """A setting that is one of these values; otherwise ValueError."""
    value = config.take(name, type(default), default)
    if value not in allowed:
        wanted = ", ".join(map(str, allowed))
        raise ValueError(f"{config.path}: {name} must be one of {wanted}, got {shown(value)}")
    return value


def activation_of(
    kind: str, d_sae: int, config: Config, tensors: Tensors
) -> tuple[Activation, dict[str, Tensor]]:
    """The activation, and its parameters and buffers by name."""
    match kind:
        case "relu":
            return ReLU(l1_coef=0.0), {}
        case "jumprelu":
            logarithm = exact(tensors.take(LOG_THRESHOLD, d_sae))
            return JumpReLU(l0_coef=0.0), {"threshold": logarithm.exp()}
        case "topk":
            return TopK(config.take("top_k", int)), {}
    return BatchTopK(config.take("top_k", int)), {"threshold": torch.tensor(UNSET)}


def scale_at(hook: str, width: int, tensors: Tensors) -> float:
    """What activations at a hook point are multiplied by."""
    norm = float(tensors.take(f"dataset_average_activation_norm.{hook}"))
    if not 0 < norm < math.inf:
        raise ValueError(f"{tensors.path}: the mean norm at {shown(hook)} must be above 0")
    return math.sqrt(width) / norm


def write(
    sae: SAE, *, hook_name: str = UNKNOWN, hook_name_out: str | None = None, **_: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    sae = exportable(sae, "llamascopium")
    rule = require_rule(sae, "llamascopium", "topk", "batchtopk", "jumprelu", "relu")
    if sae.d_out not in (None, sae.d_in) or sae.W_skip is not None:
        raise ValueError("llamascopium supports transcoders with d_out = d_in and no skip only")
    factor = sae.d_sae / sae.d_in
    while int(sae.d_in * factor) < sae.d_sae:  # it rounds down
        factor = math.nextafter(factor, math.inf)
    out = hook_name if sae.d_out is None else hook_name_out or f"{hook_name}.out"
    config = {
        "sae_type": "sae",
        "hook_point_in": hook_name,
        "hook_point_out": out,
        "d_model": sae.d_in,
        "expansion_factor": factor,
        "use_decoder_bias": True,
        "act_fn": rule.kind if rule.threshold is None else "jumprelu",
        "norm_activation": "inference",
        "sparsity_include_decoder_norm": False,
    }
    config |= {} if rule.kind != "topk" else {"top_k": rule.k}
    return config, tensors_of(sae, rule)


def tensors_of(sae: SAE, rule: Rule) -> dict[str, Tensor]:
    """Its tensors under llamascopium's names."""
    b_enc = sae.b_enc
    if sae.d_out is None:  # in bfloat16, the shift would be rounded
        b_enc = shift_bias(exact(b_enc), sae.W_enc, -sae.b_dec)
    tensors = {"W_E": sae.W_enc.T, "b_E": b_enc, "W_D": sae.W_dec, "b_D": sae.b_dec}
    if rule.threshold is not None:  # its logarithm too
        tensors[LOG_THRESHOLD] = exact(thresholds(rule, sae)).log()
    return tensors


def exact(x: Tensor) -> Tensor:
    """A tensor in float32, as llamascopium loads it; in float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
