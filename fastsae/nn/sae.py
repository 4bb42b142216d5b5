"""The sparse autoencoder: a linear encoder, an activation, a linear decoder."""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastsae.codes import Codes
from fastsae.files import read_json, read_tensors, write_json, write_tensors
from fastsae_kernels import decode

from .activations import activation_from_dict, activation_to_dict
from .topk import TopK

FORMAT = "fastsae.sae.1"


class SAE(nn.Module):
    """Reconstructs activations x from a few latents of a large dictionary.

    h = (x - b_dec) W_enc^T + b_enc, codes = activation(h), recon = codes W_dec + b_dec. Both
    weights have one row per latent, so that a latent is one contiguous read. With d_out, the
    output is another activation than the input (a transcoder) and x is not centred.
    """

    def __init__(self, d_in: int, d_sae: int, activation: TopK, d_out: int | None = None):
        super().__init__()
        for name, size in {"d_in": d_in, "d_sae": d_sae, "d_out": d_out}.items():
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        activation.check(d_sae)
        self.d_in, self.d_sae, self.d_out = d_in, d_sae, d_out
        self.activation = activation
        rows = normalize(torch.randn(d_sae, d_out or d_in), dim=-1)
        self.W_enc = nn.Parameter(
            rows.clone() if d_out is None else normalize(torch.randn(d_sae, d_in), dim=-1)
        )
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(rows)
        self.b_dec = nn.Parameter(torch.zeros(d_out or d_in))

    def encode(self, x: Float[Tensor, "... d_in"]) -> Codes:
        """The codes of x, its leading dimensions flattened to N tokens.

        Raises ValueError if the last dimension is not d_in.
        """
        return self.activation.encode(self.centre(self.tokens(x)), self.W_enc, self.b_enc)

    def tokens(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "N d_in"]:
        """x with its leading dimensions flattened; ValueError if the last one is not d_in."""
        if x.shape[-1] != self.d_in:
            raise ValueError(f"x must end in d_in = {self.d_in}, got shape {list(x.shape)}")
        return x.reshape(-1, self.d_in)

    def centre(self, x: Float[Tensor, "N d_in"]) -> Float[Tensor, "N d_in"]:
        """What the encoder's weights see."""
        return x - self.b_dec if self.d_out is None else x

    def decode(self, codes: Codes) -> Float[Tensor, "N d_out"]:
        """The reconstruction that codes stand for."""
        return decode(codes.values, codes.indices, self.W_dec) + self.b_dec

    def reconstruct(self, x: Float[Tensor, "... d_in"]) -> tuple[Float[Tensor, "N d_out"], Codes]:
        """The reconstruction of x with the codes it was decoded from, in one differentiable op."""
        centred = self.centre(self.tokens(x))
        return self.activation.reconstruct(centred, self.W_enc, self.b_enc, self.W_dec, self.b_dec)

    def forward(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        recon, _ = self.reconstruct(x)
        return recon.view(*x.shape[:-1], len(self.b_dec))

    @torch.no_grad()
    def fold_scale_(self, scale: float) -> "SAE":
        """Turn an SAE of scale * x into one of x, whose codes and output are 1 / scale as large.

        The weights stay as they are: every activation here commutes with a positive factor.
        """
        self.b_enc.div_(scale)
        self.b_dec.div_(scale)
        return self

    def save(self, directory: str | Path) -> None:
        """Write config.json and sae.safetensors, each atomically, to a directory."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        write_tensors(directory / "sae.safetensors", self.state_dict())
        config = {
            "format": FORMAT,
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "d_out": self.d_out,
            "activation": activation_to_dict(self.activation),
        }
        write_json(directory / "config.json", config)

    def extra_repr(self) -> str:
        return f"d_in={self.d_in}, d_sae={self.d_sae}"


def load(directory: str | Path, device: str | torch.device = "cpu") -> SAE:
    """The SAE that `SAE.save` wrote to a directory.

    Raises ValueError for a missing, damaged or foreign file, naming it.
    """
    directory = Path(directory)
    config = read_json(directory / "config.json")
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(f"{directory / 'config.json'} is not the config of a {FORMAT} file")
    unknown = config.keys() ^ {"format", "d_in", "d_sae", "d_out", "activation"}
    if unknown:
        raise ValueError(f"{directory / 'config.json'}: unknown or missing {sorted(unknown)}")
    tensors = read_tensors(directory / "sae.safetensors")
    with torch.device("meta"):
        sae = SAE(
            config["d_in"],
            config["d_sae"],
            activation_from_dict(config["activation"]),
            config["d_out"],
        )
    wanted = {name: list(p.shape) for name, p in sae.state_dict().items()}
    found = {name: list(t.shape) for name, t in tensors.items()}
    if wanted != found:
        raise ValueError(f"{directory / 'sae.safetensors'} must hold {wanted}, got {found}")
    sae.load_state_dict(tensors, assign=True)
    return sae.to(device)
