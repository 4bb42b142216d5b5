"""The sparse autoencoder: a linear encoder, an activation, a linear decoder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from fastsae.codes import Codes
from fastsae.config import to_dict
from fastsae.files import sealed, write_files
from fastsae.shards import ONE_PROCESS, Shards
from fastsae.version import __version__

from .activation import Activation, Weights
from .layer_norm import layer_norm as normalized
from .layer_norm import undo_layer_norm

FORMAT = "fastsae.sae.1"

LARGEST = 2**28
"""The largest width and number of latents: the bytes of a weight are then a 64-bit number."""


def unit_rows(n: int, width: int) -> Float[Tensor, "n width"]:
    """Random rows of norm 1. On the meta device nothing is drawn: there, normalizing imports
    torch.compile and triton, which takes seconds."""
    rows = torch.empty(n, width)
    return rows if rows.is_meta else normalize(rows.normal_(), dim=-1)


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
    layer_norm: each token (with layers, in each layer) is normalized to a mean of 0 and a standard
    deviation of 1, and an autoencoder's output is denormalized, as in the SAEs of arXiv:2406.04093.
    An autoencoder is trained to reconstruct the normalized tokens.

    Whatever the dtype of x, codes and output have that of the weights.
    """

    shards: Shards = ONE_PROCESS
    """The processes among which the latents are divided (see `fastsae.distributed.parallelize`)."""

    push_to_hub: ClassVar[Callable[..., Any]]
    """Pushes it to the Hugging Face hub; `fastsae.hub` attaches it (see `fastsae.push_to_hub`)."""

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
            if size is not None and not 1 <= size <= LARGEST:
                bound = "at least 1" if size < 1 else f"at most {LARGEST}"
                raise ValueError(f"{name} must be {bound}, got {size}")
        if skip and d_out is None:
            raise ValueError("skip needs d_out: an autoencoder with one would pass x on unseen")
        if d_in % layers or (layers > 1 and d_out is not None):
            raise ValueError(
                f"layers must divide d_in = {d_in} and d_out be None, got {layers} and {d_out}"
            )
        if layer_norm and d_in == layers:
            raise ValueError(f"layer_norm needs a width of at least 2, got {d_in // layers}")
        if activation.needs_autoencoder and (d_out is not None or layers > 1):
            kind = "crosscoder" if layers > 1 else "transcoder"
            raise ValueError(f"{activation} needs an autoencoder, got a {kind}")
        self.d_in, self.d_sae, self.d_out = d_in, d_sae, d_out
        self.layers, self.by_norm, self.layer_norm = layers, by_norm, layer_norm
        activation.build(d_in, d_sae)
        self.activation = activation
        rows = unit_rows(d_sae, d_out or d_in)
        self.W_enc = nn.Parameter(rows.clone() if d_out is None else unit_rows(d_sae, d_in))
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(rows)
        self.b_dec = nn.Parameter(torch.zeros(d_out or d_in))
        self.W_skip = nn.Parameter(torch.zeros(d_out or d_in, d_in)) if skip else None

    @property
    def denormalizes(self) -> bool:
        """Whether the output is multiplied by a token's deviation and moved by its mean."""
        return self.layer_norm and self.d_out is None

    def encode(self, x: Float[Tensor, "... d_in"]) -> Codes:
        """The codes of x, its leading dimensions flattened to N tokens.

        Raises ValueError if the last dimension is not d_in.
        """
        return self.activation.encode(self.center(self.tokens(x)), self.weights())

    def tokens(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "N d_in"]:
        """x with its leading dimensions flattened, and each token normalized with layer_norm."""
        x = self.flat(x)
        return normalized(x, self.layers) if self.layer_norm else x

    def flat(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "N d_in"]:
        """x with its leading dimensions flattened, in the weights' dtype; ValueError if the last is
        not d_in."""
        if x.shape[-1] != self.d_in:
            raise ValueError(f"x must end in d_in = {self.d_in}, got shape {list(x.shape)}")
        return x.reshape(-1, self.d_in).to(self.W_enc.dtype)

    def center(self, x: Float[Tensor, "N d_in"]) -> Float[Tensor, "N d_in"]:
        """Subtract b_dec in an autoencoder: the input of the encoder GEMM."""
        return x - self.shards.spread(self.b_dec) if self.d_out is None else x

    def weights(self) -> Weights:
        """The parameters as the activation sees them: with by_norm, for decoder rows of norm 1."""
        weights = Weights(self.W_enc, self.b_enc, self.W_dec, self.b_dec, self.shards)
        if not self.by_norm:
            return weights
        norm = self.decoder_norms().sum(1).clamp_min(torch.finfo(self.W_dec.dtype).tiny)
        scale = norm[:, None]
        scaled = self.W_enc * scale, self.b_enc * norm, self.W_dec / scale
        return Weights(*scaled, self.b_dec, self.shards)

    def decoder_norms(self) -> Float[Tensor, "d_sae layers"]:
        """Norm of each decoder row in each layer."""
        return torch.linalg.vector_norm(self.W_dec.unflatten(1, (self.layers, -1)), dim=2)

    def decode(self, codes: Codes, x: Tensor | None = None) -> Float[Tensor, "N d_out"]:
        """The output for codes; an autoencoder with layer_norm and a skip transcoder need their x
        for it."""
        return self.output(self.weights().decode(codes), x)

    def output(self, recon: Float[Tensor, "N d_out"], x: Tensor | None) -> Float[Tensor, "N d_out"]:
        """The output for x from a reconstruction: denormalized, or with the skip connection."""
        if self.denormalizes:
            return undo_layer_norm(recon, self.flat(given(x, "layer_norm")), self.layers)
        if self.W_skip is not None:
            return recon + self.skip(self.tokens(given(x, "a skip connection")))
        return recon

    def skip(self, tokens: Float[Tensor, "N d_in"]) -> Float[Tensor, "N d_out"] | float:
        """The skip connection's part of the output."""
        return 0.0 if self.W_skip is None else linear(tokens, self.W_skip)

    def reconstruct(self, x: Float[Tensor, "... d_in"]) -> tuple[Float[Tensor, "N d_out"], Codes]:
        """The output for x with the codes it was decoded from, in one differentiable op."""
        seen = self.center(self.tokens(x))
        recon, codes = self.activation.reconstruct(seen, self.weights())
        return self.output(recon, x), codes

    def forward(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        recon, _ = self.reconstruct(x)
        return recon.view(*x.shape[:-1], len(self.b_dec))

    @torch.no_grad()
    def fold_scale_(self, scale: float, out: float | None = None) -> "SAE":
        """Turn an SAE of scale * x into one of x, whose codes are 1 / scale as large.

        A transcoder's output was out * y and becomes y; else `out` is the same scale. A transcoder
        by_norm becomes one that is not. With layer_norm the scale of x changes nothing, codes
        neither: each token is divided by its own deviation, and the 1e-5 in it is not scaled.
        """
        out = scale if out is None else out
        scale = 1.0 if self.layer_norm else scale
        out = scale if self.d_out is None else out
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
    def fold_mean_(
        self, mean: Float[Tensor, " d_in"], out: Float[Tensor, " d_out"] | None = None
    ) -> "SAE":
        """Turn an SAE of x - mean into one of x, with the same codes.

        A transcoder's output was y - out and becomes y. ValueError with layer_norm, which sees x
        and x - mean differently, unless the mean is 0.
        """
        if self.layer_norm and mean.any():
            raise ValueError("an SAE with layer_norm cannot take on a mean of its inputs")
        if self.d_out is None:
            self.b_dec.add_(mean)
            return self
        mean = mean.to(self.W_enc)
        self.b_enc.sub_(self.W_enc @ mean)
        self.activation.fold_mean_(mean, self.weights())
        if out is not None:
            self.b_dec.add_(out)
        if self.W_skip is not None:
            self.b_dec.sub_(self.W_skip @ mean)
        return self

    @torch.no_grad()
    def fold_columns_(self, factors: Float[Tensor, " d_in"]) -> "SAE":
        """Turn an autoencoder of factors * x into one of x, with the same codes, not by_norm.

        ValueError with layer_norm: factors change what a token's mean and deviation are; and with
        corrections: factors change which error is least.
        """
        if self.layer_norm:
            raise ValueError("an SAE with layer_norm cannot take on factors of single columns")
        if self.activation.needs_autoencoder:
            raise ValueError(f"{self.activation} cannot take on factors of single columns")
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
        for parameter, seen in zip(self.weights()[:4], weights[:4], strict=True):
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
        sizes = {"d_in": self.d_in, "d_sae": self.d_sae, "d_out": self.d_out}
        skip = self.W_skip is not None
        kept = {"layers": self.layers, "by_norm": self.by_norm, "layer_norm": self.layer_norm}
        return {**sizes, "skip": skip, **kept}

    def extra_repr(self) -> str:
        shown = {"d_in": self.d_in, "d_sae": self.d_sae}
        special = {n: v for n, v in self.shape().items() if v is True or v not in (None, False, 1)}
        return ", ".join(f"{name}={value}" for name, value in (shown | special).items())


def given(x: Tensor | None, needed_by: str) -> Tensor:
    """ValueError if the tokens that codes belong to are missing."""
    if x is None:
        raise ValueError(f"an SAE with {needed_by} decodes codes together with their tokens x")
    return x
