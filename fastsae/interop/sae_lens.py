"""SAELens: cfg.json and sae_weights.safetensors, with W_enc stored as [d_in, d_sae].

A BatchTopK is saved as the JumpReLU that it is at inference, as SAELens itself does.
With reshape_activations "hook_z", the SAE takes the attention heads concatenated.
"""

from typing import Any

from torch import Tensor

from fastsae.files import shown
from fastsae.nn import SAE, Activation, BatchTopK, Gated, JumpReLU, ReLU, TopK

from .checkpoint_io import DTYPES, Config, Tensors, build_sae, exportable
from .inference_rule import Rule, require_rule, thresholds

METADATA = {"sae_lens_version": "6.0.0", "model_from_pretrained_kwargs": {}}
"""The version of SAELens whose format this is, and what its evaluation passes on to the model."""

KINDS = {
    "standard": "relu",
    "topk": "topk",
    "abstopk": "abstopk",
    "batchtopk": "batchtopk",
    "matryoshka_batchtopk": "batchtopk",
    "jumprelu": "jumprelu",
    "gated": "gated",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
"""The inference rule of each architecture."""

NORMALIZATIONS = "none", "layer_norm", "expected_average_only_in", "covariance_whitening"
"""The last two are not part of the SAE: SAELens applies them to the data."""


def read(config: Config, tensors: Tensors) -> SAE:
    """ValueError for an unsupported architecture, activation or normalization."""
    update(config)
    architecture = config.values["architecture"]
    if architecture not in KINDS:
        supported = ", ".join(KINDS)
        raise ValueError(
            f"{config.path}: architecture must be one of {supported}, got {shown(architecture)}"
        )
    d_in, d_sae = config.take("d_in", int), config.take("d_sae", int)
    if "scaling_factor" in tensors and (tensors.take("scaling_factor", d_sae) != 1).any():
        raise ValueError(f"{tensors.path}: a scaling_factor other than 1 is not supported")
    transcoder, kind = "transcoder" in architecture, KINDS[architecture]
    d_out = config.take("d_out", int) if transcoder else d_in
    centered = config.take("apply_b_dec_to_input", bool, True)
    W_enc, b_dec = tensors.take("W_enc", d_in, d_sae).T, tensors.take("b_dec", d_out)
    activation, state = activation_of(kind, d_sae, config, tensors)
    if kind == "gated" and not centered:  # the magnitudes have a bias of their own
        state["b_mag"] = state["b_mag"] + state["r_mag"].exp() * (W_enc @ b_dec)
    layer_norm = config.values.get("normalize_activations") == "layer_norm"
    if transcoder and layer_norm:
        raise ValueError(f"{config.path}: a transcoder with layer_norm is not supported")
    by_norm = "topk" in kind and config.take("rescale_acts_by_decoder_norm", bool, False)
    sae = build_sae(
        activation,
        W_enc,
        tensors.take("b_gate" if kind == "gated" else "b_enc", d_sae),
        tensors.take("W_dec", d_sae, d_out),
        b_dec,
        centered=centered,
        transcoder=transcoder,
        W_skip=tensors.take("W_skip", d_out, d_in) if "skip" in architecture else None,
        by_norm=by_norm,
        layer_norm=layer_norm,
        activation_state=state,
    )
    dtype = config.take("dtype", str, "float32").removeprefix("torch.")
    if dtype not in DTYPES:
        raise ValueError(
            f"{config.path}: dtype must be one of {', '.join(DTYPES)}, got {shown(dtype)}"
        )
    return sae.to(DTYPES[dtype])


def activation_of(
    kind: str, d_sae: int, config: Config, tensors: Tensors
) -> tuple[Activation, dict[str, Tensor]]:
    """The activation, and its parameters and buffers by name."""
    if kind in ("topk", "abstopk"):
        return TopK(config.take("k", int), by="abs" if kind == "abstopk" else "value"), {}
    if kind == "batchtopk":
        k, threshold = config.take("k", float), tensors.take("topk_threshold").float()
        if k.is_integer():
            return BatchTopK(int(k)), {"threshold": threshold}
        return JumpReLU(l0_coef=0.0), {"threshold": threshold.expand(d_sae).clone()}
    if kind == "jumprelu":
        if "log_threshold" in tensors:
            return JumpReLU(l0_coef=0.0), {"threshold": tensors.take("log_threshold", d_sae).exp()}
        return JumpReLU(l0_coef=0.0), {"threshold": tensors.take("threshold", d_sae)}
    if kind == "gated":
        return Gated(l1_coef=0.0), {n: tensors.take(n, d_sae) for n in ("r_mag", "b_mag")}
    return ReLU(l1_coef=0.0), {}


def update(config: Config) -> None:
    """Turn the config of an older version into one as SAELens 6 writes it; ValueError for settings
    that change what the SAE computes and are not supported."""
    values = config.values
    architecture = config.take("architecture", str, "standard")
    values["architecture"] = architecture
    activation = values.get("activation_fn", values.get("activation_fn_str", "relu"))
    if architecture in ("standard", "topk") and activation == "topk":
        given = values.get("activation_fn_kwargs")
        k = given.get("k") if isinstance(given, dict) else None
        values |= {"architecture": "topk", "k": values.get("k") if k is None else k}
    elif architecture == "standard" and activation not in ("relu", None):
        raise ValueError(
            f"{config.path}: activation_fn must be relu or topk, got {shown(activation)}"
        )
    normalization = values.get("normalize_activations")
    if normalization not in (None, False, True, *NORMALIZATIONS):
        raise ValueError(
            f"{config.path}: normalize_activations must be one of {', '.join(NORMALIZATIONS)}, "
            f"got {shown(normalization)}"
        )


def write(sae: SAE, **metadata: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    sae = exportable(sae, "SAELens", layer_norm=True)
    if sae.d_out is not None:
        if sae.layer_norm:
            raise ValueError("SAELens does not support transcoders with layer_norm")
        rule = require_rule(sae, "a SAELens transcoder", "relu", "jumprelu", "batchtopk")
    else:
        rule = require_rule(
            sae, "SAELens", "topk", "abstopk", "batchtopk", "jumprelu", "relu", "gated"
        )
    names = {dtype: name for name, dtype in DTYPES.items()}
    config = {
        "architecture": architecture_of(sae, rule),
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": names[sae.W_enc.dtype],
        "device": "cpu",
        "apply_b_dec_to_input": sae.d_out is None,
        "normalize_activations": "layer_norm" if sae.layer_norm else "none",
        "reshape_activations": "hook_z" if has_heads(metadata.get("hook_name")) else "none",
        "metadata": {**METADATA, **metadata},
    }
    config |= {} if sae.d_out is None else {"d_out": sae.d_out}
    if rule.kind in ("topk", "abstopk"):
        config |= {"k": rule.k, "rescale_acts_by_decoder_norm": False}
    return config, tensors_of(sae, rule)


def has_heads(hook_name: str | None) -> bool:
    """Whether the model's activations there are [..., heads, d_head]: SAELens concatenates them."""
    return hook_name is not None and hook_name.endswith("hook_z")


def architecture_of(sae: SAE, rule: Rule) -> str:
    """SAELens' name for it."""
    if sae.d_out is not None:
        skip = "" if sae.W_skip is None else "skip_"
        return f"jumprelu_{skip}transcoder" if rule.threshold is not None else f"{skip}transcoder"
    if rule.threshold is not None:
        return "jumprelu"
    return "standard" if rule.kind == "relu" else rule.kind


def tensors_of(sae: SAE, rule: Rule) -> dict[str, Tensor]:
    """Its tensors under SAELens' names."""
    tensors: dict[str, Tensor] = {"W_enc": sae.W_enc.T, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    tensors["b_gate" if rule.kind == "gated" else "b_enc"] = sae.b_enc
    if rule.threshold is not None:
        tensors["threshold"] = thresholds(rule, sae)
    if isinstance(sae.activation, Gated):
        tensors |= {"r_mag": sae.activation.r_mag, "b_mag": sae.activation.b_mag}
    if sae.W_skip is not None:
        tensors["W_skip"] = sae.W_skip
    return tensors
