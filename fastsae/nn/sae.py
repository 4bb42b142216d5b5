"""The sparse autoencoder: a linear encoder, an activation, a linear decoder."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from fastsae.codes import Codes
from fastsae.config import to_dict
from fastsae.files import sealed, write_files
from fastsae.version import __version__

from .activation import Activation, Weights

FORMAT = "fastsae.sae.1"

LAYER_NORM_EPS = 1e-5
"""What is added to a token's standard deviation, as OpenAI and SAELens do."""


class SAE(nn.Module):
    """Reconstructs activations x from a few latents of a large dictionary.

    h = (x - b_dec) W_enc^T + b_enc, codes = activation(h), recon = codes W_dec + b_dec. Both
    weights have one row per latent, so that a latent is one contiguous read.

    d_out: the output is another activation than the input (a transcoder), and x is not centered.
    skip: a transcoder also passes x on through a linear map, x W_skip^T (arXiv:2501.18823).
    layers: x is this many concatenated activations of equal width (see `Crosscoder`).
    by_norm: what the activation selects, penalizes and returns is h times the norm of the latent's
    decoder row (with layers, the sum of its norms in each), as if that norm were 1 (the decoder
    divides by it): a latent then counts by what it adds to the output.
    layer_norm: an autoencoder sees each token less its mean and divided by its standard deviation
    (over n - 1, plus 1e-5), and its output is multiplied by that deviation and moved by that mean,
    as in the SAEs of arXiv:2406.04093. It is trained to reconstruct the tokens as it sees them.
    """

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        activation: Activation,
        d_out: int | None = None,
        *,
        skip: bool = False,
        layers: int = 1,
        by_norm: bool = False,
        layer_norm: bool = False,
    ):
        super().__init__()
        for name, size in {"d_in": d_in, "d_sae": d_sae, "d_out": d_out, "layers": layers}.items():
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        check_ends(d_in, d_out, skip, layers, layer_norm)
        self.d_in, self.d_sae, self.d_out = d_in, d_sae, d_out
        self.layers, self.by_norm, self.layer_norm = layers, by_norm, layer_norm
        activation.build(d_in, d_sae)
        self.activation = activation
        rows = normalize(torch.randn(d_sae, d_out or d_in), dim=-1)
        self.W_enc = nn.Parameter(
            rows.clone() if d_out is None else normalize(torch.randn(d_sae, d_in), dim=-1)
        )
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(rows)
        self.b_dec = nn.Parameter(torch.zeros(d_out or d_in))
        self.W_skip = nn.Parameter(torch.zeros(d_out or d_in, d_in)) if skip else None

    def encode(self, x: Float[Tensor, "... d_in"]) -> Codes:
        """The codes of x, its leading dimensions flattened to N tokens.

        Raises ValueError if the last dimension is not d_in.
        """
        return self.activation.encode(self.center(self.tokens(x)), self.weights())

    def tokens(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "N d_in"]:
        """x with its leading dimensions flattened, and each token normalized with layer_norm."""
        x = self.flat(x)
        if not self.layer_norm:
            return x
        mean, deviation = moments(x)
        return (x - mean) / (deviation + LAYER_NORM_EPS)

    def flat(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "N d_in"]:
        """x with its leading dimensions flattened; ValueError if the last one is not d_in."""
        if x.shape[-1] != self.d_in:
            raise ValueError(f"x must end in d_in = {self.d_in}, got shape {list(x.shape)}")
        return x.reshape(-1, self.d_in)

    def center(self, x: Float[Tensor, "N d_in"]) -> Float[Tensor, "N d_in"]:
        """Subtract b_dec in an autoencoder: the input of the encoder GEMM."""
        return x - self.b_dec if self.d_out is None else x

    def weights(self) -> Weights:
        """The parameters as the activation sees them: with by_norm, for decoder rows of norm 1."""
        weights = Weights(self.W_enc, self.b_enc, self.W_dec, self.b_dec)
        if not self.by_norm:
            return weights
        norm = self.decoder_norms().sum(1).clamp_min(torch.finfo(self.W_dec.dtype).tiny)
        scale = norm[:, None]
        return Weights(self.W_enc * scale, self.b_enc * norm, self.W_dec / scale, self.b_dec)

    def decoder_norms(self) -> Float[Tensor, "d_sae layers"]:
        """Norm of each decoder row in each layer."""
        return torch.linalg.vector_norm(self.W_dec.unflatten(1, (self.layers, -1)), dim=2)

    def decode(self, codes: Codes, x: Tensor | None = None) -> Float[Tensor, "N d_out"]:
        """The reconstruction that codes stand for; with skip and layer_norm, together with x."""
        recon = self.weights().decode(codes)
        if self.W_skip is None and not self.layer_norm:
            return recon
        if x is None:
            kind = "an SAE with layer_norm" if self.layer_norm else "a skip transcoder"
            raise ValueError(f"{kind} decodes codes together with their tokens x")
        return self.output(recon, self.flat(x))

    def output(
        self, recon: Float[Tensor, "N d_out"], x: Float[Tensor, "N d_in"]
    ) -> Float[Tensor, "N d_out"]:
        """The output from a reconstruction: undo layer_norm, or add the skip connection."""
        if self.layer_norm:
            mean, deviation = moments(x)
            return recon * deviation + mean
        return recon + self.skip(x)

    def skip(self, x: Float[Tensor, "N d_in"]) -> Float[Tensor, "N d_out"] | float:
        """The skip connection's part of the output."""
        return 0.0 if self.W_skip is None else linear(x, self.W_skip)

    def reconstruct(self, x: Float[Tensor, "... d_in"]) -> tuple[Float[Tensor, "N d_out"], Codes]:
        """The output for x with the codes it was decoded from, in one differentiable op."""
        seen = self.center(self.tokens(x))
        recon, codes = self.activation.reconstruct(seen, self.weights())
        return self.output(recon, self.flat(x)), codes

    def forward(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        recon, _ = self.reconstruct(x)
        return recon.view(*x.shape[:-1], len(self.b_dec))

    @torch.no_grad()
    def fold_scale_(self, scale: float, out: float | None = None) -> "SAE":
        """Turn an SAE of scale * x into one of x, whose codes are 1 / scale as large.

        A transcoder's output was out * y and becomes y; else `out` is the same scale. A transcoder
        by_norm becomes one that is not. With layer_norm nothing changes, codes neither: each token
        is divided by its own deviation, and the 1e-5 in it is not scaled.
        """
        if self.layer_norm:
            return self
        out = scale if out is None else out
        if out != scale:
            self.fold_decoder_norms_()
        self.b_enc.div_(scale)
        self.b_dec.div_(out)
        if out != scale:
            self.W_dec.mul_(scale / out)
            if self.W_skip is not None:
                self.W_skip.mul_(scale / out)
        self.activation.fold_scale_(scale)
        return self

    @torch.no_grad()
    def fold_columns_(self, factors: Float[Tensor, " d_in"]) -> "SAE":
        """Turn an autoencoder of factors * x into one of x, with the same codes, not by_norm.

        ValueError with layer_norm: factors change what a token's mean and deviation are.
        """
        if self.layer_norm:
            raise ValueError("an SAE with layer_norm cannot take on factors of single columns")
        self.fold_decoder_norms_()
        self.W_enc.mul_(factors)
        self.W_dec.div_(factors)
        self.b_dec.div_(factors)
        self.activation.fold_columns_(factors)
        return self

    @torch.no_grad()
    def fold_decoder_norms_(self) -> None:
        """Multiply the weights by the norms that by_norm uses, and end by_norm; codes stay the
        same."""
        weights, self.by_norm = self.weights(), False
        for parameter, seen in zip(self.weights(), weights, strict=True):
            parameter.copy_(seen)

    def save(self, directory: str | Path) -> None:
        """Write config.json and sae.safetensors, which `fastsae.load` reads.

        An SAE that the directory holds is replaced as a whole, at whatever moment this is killed.
        """
        tensors = self.state_dict()
        contents = {"config.json": sealed(self.config(), tensors), "sae.safetensors": tensors}
        write_files(Path(directory), contents)

    def config(self) -> dict[str, Any]:
        """What `fastsae.load` builds the SAE from: its shape and its activation's settings."""
        about = {"format": FORMAT, "version": __version__}
        return {**about, **self.shape(), "activation": to_dict(self.activation.cfg)}

    def shape(self) -> dict[str, Any]:
        """The constructor's arguments, without the activation."""
        ends = {"d_in": self.d_in, "d_sae": self.d_sae, "d_out": self.d_out}
        skip = self.W_skip is not None
        kept = {"layers": self.layers, "by_norm": self.by_norm, "layer_norm": self.layer_norm}
        return {**ends, "skip": skip, **kept}

    def extra_repr(self) -> str:
        shown = {"d_in": self.d_in, "d_sae": self.d_sae}
        special = {n: v for n, v in self.shape().items() if v is True or v not in (None, False, 1)}
        return ", ".join(f"{name}={value}" for name, value in (shown | special).items())


def check_ends(d_in: int, d_out: int | None, skip: bool, layers: int, layer_norm: bool) -> None:
    """ValueError for options that cannot be combined."""
    if skip and d_out is None:
        raise ValueError("skip needs d_out: an autoencoder with one would pass x on unseen")
    if d_in % layers or (layers > 1 and d_out is not None):
        raise ValueError(
            f"layers must divide d_in = {d_in} and d_out be None, got {layers} and {d_out}"
        )
    if layer_norm and (d_out is not None or layers > 1 or d_in < 2):
        raise ValueError(
            "layer_norm needs an autoencoder with one layer and a d_in of at least 2, "
            f"got d_out = {d_out}, layers = {layers} and d_in = {d_in}"
        )


def moments(x: Float[Tensor, "N d_in"]) -> tuple[Float[Tensor, "N 1"], Float[Tensor, "N 1"]]:
    """The mean of each token's entries and their standard deviation, also of no tokens at all."""
    mean = x.mean(1, keepdim=True)
    norm = torch.linalg.vector_norm(x - mean, dim=1, keepdim=True)
    return mean, norm / (x.shape[1] - 1) ** 0.5
