"""dictionary_learning with our ops."""

from typing import Any

import torch
from dictionary_learning.dictionary import JumpReluAutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from torch import Tensor

from fastsae.codes import Codes
from fastsae.nn.sparse_pre import SparsePre
from fastsae_kernels import encode_topk, topk_indices

from . import own_class
from .dense import (
    codes_behind,
    entries,
    gains,
    hooked,
    largest_of_batch,
    pre_activations,
    remember,
    written_out,
)


def ours(sae: AutoEncoderTopK | BatchTopKSAE, x: Tensor) -> bool:
    """Whether to encode x by our ops: nothing else has a part in it."""
    plain = type(sae.encoder) is type(sae.decoder) is torch.nn.Linear
    return plain and gains(sae, x) and not hooked(sae.encoder)


def encoder_of(sae: AutoEncoderTopK | BatchTopKSAE, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens as the encoder sees them, its weight and its bias."""
    return (x - sae.b_dec).reshape(-1, x.shape[-1]), sae.encoder.weight, sae.encoder.bias


def decode_codes(sae: AutoEncoderTopK | BatchTopKSAE, codes: Codes, shape: torch.Size) -> Tensor:
    """Decode codes of tokens or activations of that shape."""
    return (codes.decode(sae.decoder.weight.T) + sae.b_dec).view(*shape[:-1], -1)


def decode(self: AutoEncoderTopK | BatchTopKSAE, x: Tensor) -> Tensor:
    """Decode activations, by the codes behind them where those are known."""
    codes = None if hooked(self.decoder) else codes_behind(x)
    return self.decoder(x) + self.b_dec if codes is None else decode_codes(self, codes, x.shape)


def forward(self: Any, x: Tensor, output_features: bool = False) -> Any:
    """Without dense activations, unless someone wants them."""
    if output_features or not ours(self, x) or hooked(self.decoder):
        return own_class(self).forward(self, x, output_features)
    return decode_codes(self, self.codes(x), x.shape)


class FastAutoEncoderTopK(AutoEncoderTopK):
    decode, forward = decode, forward

    def encode(self, x: Tensor, return_topk: bool = False, use_threshold: bool = False) -> Any:
        if use_threshold or not ours(self, x):
            return super().encode(x, return_topk, use_threshold)
        shape = *x.shape[:-1], self.dict_size
        if not return_topk:
            return written_out(self.codes(x), shape)
        encoder, k = encoder_of(self, x), int(self.k)
        post = pre_activations(*encoder).relu_()
        indices = topk_indices(post, k)
        codes = Codes(entries(post, indices, *encoder).relu(), indices, self.dict_size)
        dense = remember(written_out(codes, shape), codes)  # the trainer decodes it as it is
        top = (part.view(*shape[:-1], k) for part in (codes.values, indices))
        return dense, *top, post.view(shape)

    def codes(self, x: Tensor) -> Codes:
        return Codes(*encode_topk(*encoder_of(self, x), int(self.k)), self.dict_size)


class FastBatchTopKSAE(BatchTopKSAE):
    decode, forward = decode, forward

    def encode(self, x: Tensor, return_active: bool = False, use_threshold: bool = True) -> Any:
        # the largest of a batch are chosen for k x.size(0) tokens, whatever its other dimensions
        if not ours(self, x) or use_threshold == return_active or x.dim() != 2:
            return super().encode(x, return_active, use_threshold)
        shape = *x.shape[:-1], self.dict_size
        if use_threshold:
            return written_out(self.codes(x), shape)
        encoder = encoder_of(self, x)
        post = pre_activations(*encoder).relu_()
        codes = largest_of_batch(post, int(self.k) * len(x), encoder)
        dense = remember(written_out(codes, shape), codes)  # the trainer decodes it as it is
        return dense, dense.sum(0) > 0, post

    def codes(self, x: Tensor) -> Codes:
        """Those above the threshold, which is below 0 before it is known."""
        threshold = self.threshold.clamp(min=0).expand(self.dict_size)
        found = SparsePre.above(*encoder_of(self, x), threshold)
        return found.codes(found.pre)


class FastJumpReluAutoEncoder(JumpReluAutoEncoder):
    """Its trainer computes the pre-activations and JumpReLU itself, and dense: it gains nothing."""

    def encode(self, x: Tensor, output_pre_jump: bool = False) -> Any:
        if output_pre_jump or not gains(self, x):
            return super().encode(x, output_pre_jump)
        return written_out(self.codes(x), (*x.shape[:-1], self.dict_size))

    def codes(self, x: Tensor) -> Codes:
        seen = x - self.b_dec if self.apply_b_dec_to_input else x
        seen, threshold = seen.reshape(-1, self.activation_dim), self.threshold.clamp(min=0)
        found = SparsePre.above(seen, self.W_enc.T, self.b_enc, threshold)
        return found.codes(found.pre)

    def decode(self, f: Tensor) -> Tensor:
        codes = codes_behind(f)
        return super().decode(f) if codes is None else self.decode_codes(codes, f.shape)

    def decode_codes(self, codes: Codes, shape: torch.Size) -> Tensor:
        return (codes.decode(self.W_dec) + self.b_dec).view(*shape[:-1], -1)

    def forward(self, x: Tensor, output_features: bool = False) -> Any:
        if output_features or not gains(self, x):
            return super().forward(x, output_features)
        return self.decode_codes(self.codes(x), x.shape)
