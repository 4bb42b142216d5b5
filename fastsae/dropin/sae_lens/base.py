"""What the accelerated classes of SAELens share."""

from typing import Any, cast

import torch
from torch import Tensor

from fastsae.codes import Codes, at_latents
from fastsae.dropin.dense import (
    AboveThreshold,
    Encoder,
    has_hooks,
    has_overridden_methods,
    lookup,
    to_dense,
    worth_accelerating,
)
from fastsae.nn.sparse_pre import SparsePre

Library = cast(Any, object)  # type checkers let a mixin of its classes use all of their members


class Fast(Library):
    """Mixin with what all accelerated classes share."""

    activation: type
    """The class of activation_fn, unless it was replaced."""

    def codes(self, encoder: Encoder) -> Codes:
        """The codes of the tokens, with sparse gradients; each class implements it."""
        raise NotImplementedError

    def stays_dense(self) -> bool:
        """Whether the next batch takes the library's code without being examined."""
        return False

    def is_dense(self, encoder: Encoder) -> bool:
        """Whether the library's own code is faster for these tokens."""
        return False

    def uses_fast_path(self, x: Tensor) -> bool:
        """Whether fastsae's ops can encode x: nothing was customized or hooked."""
        if not worth_accelerating(x):
            return False
        plain = type(self.activation_fn) is self.activation
        return plain and not has_hooks(self.hook_sae_acts_pre, self.activation_fn)

    def skips_codes(self, x: Tensor) -> bool:
        """Whether the codes between x and its reconstruction are for nobody to see."""
        if not self.uses_fast_path(x) or self.use_error_term:
            return False
        methods = "encode", "encode_with_hidden_pre", "decode"
        return not (has_hooks(*self.hook_dict.values()) or has_overridden_methods(self, *methods))

    @property
    def by_norm(self) -> bool:
        """Whether pre-activations are scaled by the norm of the decoder row."""
        return getattr(self.cfg, "rescale_acts_by_decoder_norm", False)

    @property
    def encoder_bias(self) -> Tensor:
        return self.b_enc

    def encoder_of(self, x: Tensor) -> tuple[Encoder, tuple[int, ...]]:
        """The encoder with its tokens, and the shape of the dense activations."""
        seen = self.process_sae_in(x)
        W_enc, b_enc = self.W_enc.T, self.encoder_bias
        if self.by_norm:
            norm = self.W_dec.norm(dim=-1)
            W_enc, b_enc = W_enc * norm[:, None], b_enc * norm
        shape = *seen.shape[:-1], len(W_enc)
        return Encoder(seen.reshape(-1, seen.shape[-1]), W_enc, b_enc), shape

    def encode(self, x: Tensor) -> Tensor:
        if not self.uses_fast_path(x):
            return super().encode(x)
        if self.stays_dense():
            return self.library_encode(x)
        encoder, shape = self.encoder_of(x)
        if self.is_dense(encoder):
            return self.library_encode(x)
        return self.hook_sae_acts_post(self.dense(self.codes(encoder), shape))

    def library_encode(self, x: Tensor) -> Tensor:
        """The library's own encode."""
        return super().encode(x)

    def dense(self, codes: Codes, shape: tuple[int, ...]) -> Tensor:
        """The codes in the library's form."""
        return to_dense(codes, shape)

    def decode(self, feature_acts: Tensor) -> Tensor:
        codes = lookup(feature_acts, Codes)
        if codes is None:
            return super().decode(feature_acts)
        return self.decode_codes(codes, feature_acts.shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.reconstruct(x) if self.skips_codes(x) else super().forward(x)

    def reconstruct(self, x: Tensor) -> Tensor:
        """Encode and decode without dense activations, unless these are faster."""
        if self.stays_dense():
            return self.decode(self.library_encode(x))
        encoder, shape = self.encoder_of(x)
        if self.is_dense(encoder):
            return self.decode(self.library_encode(x))
        return self.decode_codes(self.codes(encoder), shape)

    def decode_codes(self, codes: Codes, shape: tuple[int, ...]) -> Tensor:
        """Decode the codes of activations of that shape."""
        recon = self.times_decoder(codes) + self.b_dec
        return self.finished(recon.view(*shape[:-1], -1))

    def times_decoder(self, codes: Codes) -> Tensor:
        """The codes times the decoder, without its bias."""
        if self.by_norm:
            scale = at_latents(1 / self.W_dec.norm(dim=-1), codes.indices)
            codes = codes._replace(values=codes.values * scale)
        return codes.decode(self.W_dec)

    def finished(self, recon: Tensor) -> Tensor:
        """What the library's decode does after the decoder."""
        recon = self.run_time_activation_norm_fn_out(self.hook_sae_recons(recon))
        return self.reshape_fn_out(recon, self.d_head)


class Above(AboveThreshold, Fast):
    """Mixin of classes in which all latents above a threshold are active."""

    activation = torch.nn.ReLU

    def uses_fast_path(self, x: Tensor) -> bool:
        # a hook must not see the inputs twice, for this code and for the library's
        return super().uses_fast_path(x) and not has_hooks(self.hook_sae_input)


class PlainReLU(Above):
    """Mixin of classes whose own code is two matmuls and a ReLU."""

    inference_part = 1 / 6


class Gates(Above):
    """Mixin of gated classes: one GEMM for gates and magnitudes, which differ by scale and bias.

    The encoder has no bias, so that its pre-activations serve both.
    """

    @property
    def encoder_bias(self) -> Tensor:
        return torch.zeros_like(self.b_gate)

    def lowest(self) -> Tensor:
        return -self.b_gate.detach()

    def codes_of(self, found: SparsePre) -> Codes:
        magnitude = found.pre * found.pick(self.r_mag.exp()) + found.pick(self.b_mag)
        return found.codes(magnitude.relu())
