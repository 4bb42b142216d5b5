"""SAELens: cfg.json beside sae_weights.safetensors, W_enc with a column for each latent.

A BatchTopK is saved as the JumpReLU that it is outside training, as SAELens itself does.
"""

from pathlib import Path
from typing import Any

import torch

from fastsae.files import read_json, read_tensors, write_json, write_tensors
from fastsae.nn import SAE, Activation, BatchTopK, Gated, JumpReLU, ReLU, TopK

from .parts import DTYPES, MOST_JSON, Tensors, assembled, plain, setting
from .rules import expressed, thresholds

NAME, FILES = "sae_lens", ("cfg.json", "sae_weights.safetensors")
VERSION = "6.0.0"
"""Of SAELens, whose files these are."""

ARCHITECTURES = {
    "standard": "relu",
    "topk": "topk",
    "abstopk": "abstopk",
    "batchtopk": "batchtopk",
    "jumprelu": "jumprelu",
    "matryoshka_batchtopk": "batchtopk",
    "gated": "gated",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
}


def read(folder: Path) -> SAE:
    """The SAE; ValueError for a damaged file, an architecture or a normalisation we have not."""
    path = folder / FILES[0]
    config = current(read_json(path, MOST_JSON), path)
    architecture = config["architecture"]
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"{path}: architecture must be one of {known}, got {architecture!r}")
    normalisation = config.get("normalize_activations", "none")
    if normalisation not in ("none", "expected_average_only_in"):  # that one scales data, not here
        raise ValueError(f"{path}: normalize_activations {normalisation!r} is not supported")
    d_in, d_sae = (setting(config, name, int, path) for name in ("d_in", "d_sae"))
    transcodes = "transcoder" in architecture
    d_out = setting(config, "d_out", int, path) if transcodes else d_in
    tensors = Tensors(folder / FILES[1], read_tensors(folder / FILES[1]))
    kind, own = ARCHITECTURES[architecture], {}
    bias = "b_gate" if kind == "gated" else "b_enc"
    activation: Activation
    if kind == "topk" or kind == "abstopk":
        k = setting(config, "k", int, path)
        activation = TopK(k, by="abs" if kind == "abstopk" else "value")
    elif kind == "batchtopk":
        k = setting(config, "k", float, path)
        if not k.is_integer():
            raise ValueError(f"{path}: k must be a whole number, got {k}")
        activation = BatchTopK(int(k))
        own["threshold"] = tensors.take("topk_threshold").float()
    elif kind == "jumprelu":
        activation = JumpReLU(l0_coef=0.0)
        own["threshold"] = tensors.take("threshold", d_sae)
    elif kind == "gated":
        activation = Gated(l1_coef=0.0)
        own |= {name: tensors.take(name, d_sae) for name in ("r_mag", "b_mag")}
    else:
        activation = ReLU(l1_coef=0.0)
    return assembled(
        activation,
        tensors.take("W_enc", d_in, d_sae).T,
        tensors.take(bias, d_sae),
        tensors.take("W_dec", d_sae, d_out),
        tensors.take("b_dec", d_out),
        centres=setting(config, "apply_b_dec_to_input", bool, path, True),
        transcodes=transcodes,
        W_skip=tensors.take("W_skip", d_out, d_in) if "W_skip" in tensors else None,
        by_norm=setting(config, "rescale_acts_by_decoder_norm", bool, path, False),
        own=own,
    )


def current(config: Any, path: Path) -> dict[str, Any]:
    """A config as SAELens 6 writes it, from that or an older one."""
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object")
    config = {"architecture": "standard", **config}
    setting(config, "architecture", str, path)
    activation = config.get("activation_fn", config.get("activation_fn_str", "relu"))
    if config["architecture"] == "standard" and activation == "topk":
        given = config.get("activation_fn_kwargs")
        k = given.get("k") if isinstance(given, dict) else None
        config |= {"architecture": "topk", "k": k}
    elif config["architecture"] == "standard" and activation not in ("relu", None):
        raise ValueError(f"{path}: activation_fn must be relu or topk, got {activation!r}")
    return config


def write(sae: SAE, folder: Path, metadata: dict[str, Any] | None = None) -> None:
    """ValueError for an SAE that SAELens has not, with the reason."""
    sae = plain(sae, NAME)
    transcodes = sae.d_out is not None
    if transcodes:
        rule = expressed(sae, "a SAELens transcoder", "relu", "jumprelu", "batchtopk")
    else:
        rule = expressed(
            sae, "SAELens", "topk", "abstopk", "batchtopk", "jumprelu", "relu", "gated"
        )
    if sae.W_skip is not None and rule.kind != "relu":
        raise ValueError(f"a SAELens skip transcoder holds relu, not {rule.kind}")
    weights = {"W_enc": sae.W_enc.T, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    bias = "b_gate" if rule.kind == "gated" else "b_enc"
    weights[bias] = sae.b_enc
    config: dict[str, Any] = {"d_in": sae.d_in, "d_sae": sae.d_sae}
    architecture = "standard" if rule.kind == "relu" else rule.kind
    if rule.threshold is not None:
        architecture = "jumprelu"
        weights["threshold"] = thresholds(rule, sae.d_sae).to(sae.W_enc.dtype)
    if isinstance(sae.activation, Gated):
        weights |= {"r_mag": sae.activation.r_mag, "b_mag": sae.activation.b_mag}
    if architecture in ("topk", "abstopk"):
        config |= {"k": rule.k, "rescale_acts_by_decoder_norm": False}
    if transcodes:
        config["d_out"] = sae.d_out
        architecture = "jumprelu_transcoder" if rule.threshold is not None else "transcoder"
    if sae.W_skip is not None:
        architecture, weights["W_skip"] = "skip_transcoder", sae.W_skip
    names = {dtype: name for name, dtype in DTYPES.items()}
    config |= {
        "architecture": architecture,
        "dtype": names[sae.W_enc.dtype],
        "device": "cpu",
        "apply_b_dec_to_input": not transcodes,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": VERSION, **(metadata or {})},
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / FILES[1], {n: torch.as_tensor(t) for n, t in weights.items()})
    write_json(folder / FILES[0], config)
