"""SAELens: cfg.json beside sae_weights.safetensors, W_enc with a column for each latent.

A BatchTopK is saved as the JumpReLU that it is outside training, as SAELens itself does.
With reshape_activations "hook_z", the heads of an activation are side by side here.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from fastsae.files import read_json, read_tensors, write_json, write_tensors
from fastsae.nn import SAE, Activation, BatchTopK, Gated, JumpReLU, ReLU, TopK

from .parts import DTYPES, MOST_JSON, Tensors, assembled, object_in, plain, setting
from .rules import Rule, expressed, thresholds

NAME, FILES = "sae_lens", ("cfg.json", "sae_weights.safetensors")
VERSION = "6.0.0"
"""Of SAELens, whose files these are."""

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
"""What each architecture is here."""

NORMALISATIONS = "none", "layer_norm", "expected_average_only_in", "covariance_whitening"
"""Of tokens by the SAE, but for the last two: SAELens does those to data before they reach it."""


def read(folder: Path) -> SAE:
    """The SAE; ValueError for a damaged file, an architecture or a normalisation we have not."""
    path = folder / FILES[0]
    config = current(object_in(read_json(path, MOST_JSON), path), path)
    architecture = config["architecture"]
    if architecture not in KINDS:
        raise ValueError(
            f"{path}: architecture must be one of {', '.join(KINDS)}, got {architecture!r}"
        )
    tensors = Tensors(folder / FILES[1], read_tensors(folder / FILES[1]))
    d_in, d_sae = (setting(config, name, int, path) for name in ("d_in", "d_sae"))
    if "scaling_factor" in tensors and (tensors.take("scaling_factor", d_sae) != 1).any():
        raise ValueError(f"{tensors.path}: a scaling_factor that is not 1 is not supported")
    transcodes, kind = "transcoder" in architecture, KINDS[architecture]
    d_out = setting(config, "d_out", int, path) if transcodes else d_in
    centres = setting(config, "apply_b_dec_to_input", bool, path, True)
    W_enc, b_dec = tensors.take("W_enc", d_in, d_sae).T, tensors.take("b_dec", d_out)
    activation, own = activation_of(kind, config, tensors, path)
    if kind == "gated" and not centres:  # its magnitudes have a bias too
        own["b_mag"] = own["b_mag"] + own["r_mag"].exp() * (W_enc @ b_dec)
    sae = assembled(
        activation,
        W_enc,
        tensors.take("b_gate" if kind == "gated" else "b_enc", d_sae),
        tensors.take("W_dec", d_sae, d_out),
        b_dec,
        centres=centres,
        transcodes=transcodes,
        W_skip=tensors.take("W_skip", d_out, d_in) if "skip" in architecture else None,
        by_norm="topk" in kind
        and setting(config, "rescale_acts_by_decoder_norm", bool, path, False),
        layer_norm=config.get("normalize_activations") == "layer_norm",
        own=own,
    )
    dtype = setting(config, "dtype", str, path, "float32").removeprefix("torch.")
    if dtype not in DTYPES:
        raise ValueError(f"{path}: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return sae.to(DTYPES[dtype])


def activation_of(
    kind: str, config: dict[str, Any], tensors: Tensors, path: Path
) -> tuple[Activation, dict[str, Tensor]]:
    """The activation, and its parameters and buffers by their names."""
    d_sae = setting(config, "d_sae", int, path)
    if kind in ("topk", "abstopk"):
        return TopK(setting(config, "k", int, path), by="abs" if kind == "abstopk" else "value"), {}
    if kind == "batchtopk":
        k, threshold = setting(config, "k", float, path), tensors.take("topk_threshold").float()
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


def current(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """A config as SAELens 6 writes it, from that or an older one; ValueError for settings that
    change what the SAE computes, and are not supported."""
    config = {"architecture": "standard", **config}
    architecture = setting(config, "architecture", str, path)
    activation = config.get("activation_fn", config.get("activation_fn_str", "relu"))
    if architecture in ("standard", "topk") and activation == "topk":
        given = config.get("activation_fn_kwargs")
        k = given.get("k") if isinstance(given, dict) else None
        config |= {"architecture": "topk", "k": config.get("k") if k is None else k}
    elif architecture == "standard" and activation not in ("relu", None):
        raise ValueError(f"{path}: activation_fn must be relu or topk, got {activation!r}")
    normalisation = config.get("normalize_activations")
    if normalisation not in (None, False, True, *NORMALISATIONS):
        raise ValueError(
            f"{path}: normalize_activations must be one of {', '.join(NORMALISATIONS)}, "
            f"got {normalisation!r}"
        )
    return config


def write(sae: SAE, folder: Path, metadata: dict[str, Any] | None = None) -> None:
    """ValueError for an SAE that SAELens has not, with the reason.

    metadata: what else is known of it, by SAELens' names, such as model_name and hook_name.
    """
    sae = plain(sae, "SAELens", layer_norm=True)
    if sae.d_out is not None:
        rule = expressed(sae, "a SAELens transcoder", "relu", "jumprelu", "batchtopk")
    else:
        rule = expressed(
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
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": VERSION, **(metadata or {})},
    }
    config |= {} if sae.d_out is None else {"d_out": sae.d_out}
    if rule.kind in ("topk", "abstopk"):
        config |= {"k": rule.k, "rescale_acts_by_decoder_norm": False}
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / FILES[1], weights_of(sae, rule))
    write_json(folder / FILES[0], config)


def architecture_of(sae: SAE, rule: Rule) -> str:
    """SAELens' name for it."""
    if sae.d_out is not None:
        skip = "" if sae.W_skip is None else "skip_"
        return f"jumprelu_{skip}transcoder" if rule.threshold is not None else f"{skip}transcoder"
    if rule.threshold is not None:
        return "jumprelu"
    return "standard" if rule.kind == "relu" else rule.kind


def weights_of(sae: SAE, rule: Rule) -> dict[str, Tensor]:
    """Its tensors under SAELens' names."""
    weights: dict[str, Tensor] = {"W_enc": sae.W_enc.T, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    weights["b_gate" if rule.kind == "gated" else "b_enc"] = sae.b_enc
    if rule.threshold is not None:
        weights["threshold"] = thresholds(rule, sae.d_sae).to(sae.W_enc.dtype)
    if isinstance(sae.activation, Gated):
        weights |= {"r_mag": sae.activation.r_mag, "b_mag": sae.activation.b_mag}
    if sae.W_skip is not None:
        weights["W_skip"] = sae.W_skip
    return weights
