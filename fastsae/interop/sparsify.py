"""EleutherAI's sparsify: cfg.json beside sae.safetensors, the encoder a torch.nn.Linear."""

from pathlib import Path

from fastsae.files import read_json, read_tensors, write_json, write_tensors
from fastsae.nn import SAE, TopK

from .parts import MOST_JSON, Tensors, assembled, moved, object_in, plain, setting
from .rules import expressed

NAME, FILES = "sparsify", ("cfg.json", "sae.safetensors")


def read(folder: Path) -> SAE:
    """The SAE; ValueError for a damaged file and for the activation groupmax."""
    path = folder / FILES[0]
    config = object_in(read_json(path, MOST_JSON), path)
    activation = config.get("activation", "topk")
    if activation != "topk":
        raise ValueError(f"{path}: activation must be topk, got {activation!r}")
    d_in, k = (setting(config, name, int, path) for name in ("d_in", "k"))
    transcodes, skips = (
        setting(config, name, bool, path, False) for name in ("transcode", "skip_connection")
    )
    d_sae = setting(config, "num_latents", int, path, 0)
    d_sae = d_sae or d_in * setting(config, "expansion_factor", int, path, 32)
    tensors = Tensors(folder / FILES[1], read_tensors(folder / FILES[1]))
    W_enc, b_enc = tensors.take("encoder.weight", d_sae, d_in), tensors.take("encoder.bias", d_sae)
    b_dec = tensors.take("b_dec", d_in)
    if skips and not transcodes:  # x is centred for the encoder, not for the skip
        b_enc = moved(b_enc, W_enc, -b_dec)
    return assembled(
        TopK(k),
        W_enc,
        b_enc,
        tensors.take("W_dec", d_sae, d_in),
        b_dec,
        transcodes=transcodes or skips,
        W_skip=tensors.take("W_skip", d_in, d_in) if skips else None,
    )


def write(sae: SAE, folder: Path) -> None:
    """ValueError for an SAE that sparsify has not, with the reason."""
    sae = plain(sae, NAME)
    rule = expressed(sae, NAME, "topk")
    if sae.d_out not in (None, sae.d_in):
        raise ValueError(f"sparsify's transcoders have d_out = d_in, got {sae.d_out}, {sae.d_in}")
    weights = {
        "encoder.weight": sae.W_enc,
        "encoder.bias": sae.b_enc,
        "W_dec": sae.W_dec,
        "b_dec": sae.b_dec,
    }
    weights |= {} if sae.W_skip is None else {"W_skip": sae.W_skip}
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
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / FILES[1], weights)
    write_json(folder / FILES[0], config)
