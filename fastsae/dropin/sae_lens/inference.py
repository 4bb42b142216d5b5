"""Accelerated classes of SAELens for inference."""

from sae_lens.saes.abstopk_sae import AbsTopK, AbsTopKSAE
from sae_lens.saes.gated_sae import GatedSAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from sae_lens.saes.standard_sae import StandardSAE
from sae_lens.saes.topk_sae import TopK, TopKSAE
from sae_lens.saes.transcoder import (
    JumpReLUSkipTranscoder,
    JumpReLUTranscoder,
    SkipTranscoder,
    Transcoder,
)
from torch import Tensor

from fastsae.codes import Codes
from fastsae.dropin.dense import Encoder
from fastsae_kernels import encode_topk

from .base import Above, Fast, Gates, PlainReLU


class FastTopKSAE(Fast, TopKSAE):
    activation = TopK

    def codes(self, encoder: Encoder) -> Codes:
        return Codes(*encode_topk(*encoder, self.activation_fn.k), self.cfg.d_sae)


class FastAbsTopKSAE(Fast, AbsTopKSAE):
    activation = AbsTopK

    def codes(self, encoder: Encoder) -> Codes:
        return Codes(*encode_topk(*encoder, self.activation_fn.k, by="abs"), self.cfg.d_sae)


class FastStandardSAE(PlainReLU, StandardSAE):
    pass


class Thresholds(Above):
    """Mixin of classes with a threshold for each latent."""

    def lowest(self) -> Tensor:
        return self.threshold.detach().clamp(min=0)


class FastJumpReLUSAE(Thresholds, JumpReLUSAE):
    pass


class FastGatedSAE(Gates, GatedSAE):
    pass


class Transcodes(Above):
    """Mixin of transcoders, whose outputs are not inputs: no normalization is undone."""

    def finished(self, recon: Tensor) -> Tensor:
        return self.hook_sae_recons(recon)


class Skips(Transcodes):
    """Mixin of transcoders with a skip connection, which is no part of their decode."""

    def reconstruct(self, x: Tensor) -> Tensor:
        return super().reconstruct(x) + x @ self.W_skip.T.to(x.device)


class PlainTranscodes(Transcodes, PlainReLU):
    """Mixin of transcoders with a plain ReLU, whose step is mostly matmuls."""

    training_part = 3 / 4


class FastTranscoder(PlainTranscodes, Transcoder):
    pass


class FastSkipTranscoder(Skips, PlainTranscodes, SkipTranscoder):
    pass


class FastJumpReLUTranscoder(Thresholds, Transcodes, JumpReLUTranscoder):
    pass


class FastJumpReLUSkipTranscoder(Thresholds, Skips, JumpReLUSkipTranscoder):
    pass
