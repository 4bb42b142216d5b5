"""Accelerated classes of dictionary_learning."""

from typing import Any, TypeAlias

import torch
from dictionary_learning.dictionary import JumpReluAutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from torch import Tensor

from fastsae.codes import Codes
from fastsae.nn.sparse_pre import SparsePre
from fastsae_kernels import encode_topk, topk_indices

from . import library_class
from .dense import Encoder, attach_codes, has_hooks, lookup_codes, to_dense, worth_accelerating

Linear: TypeAlias = AutoEncoderTopK | BatchTopKSAE
"""Classes whose encoder and decoder are linear layers."""


def uses_fast_path(sae: Linear, x: Tensor) -> bool:
    """Whether fastsae's ops can encode x: nothing was customized or hooked."""
    plain = type(sae.encoder) is type(sae.decoder) is torch.nn.Linear
    return plain and worth_accelerating(sae, x) and not has_hooks(sae.encoder)


def encoder_of(sae: Linear, x: Tensor) -> Encoder:
    """The encoder with the centered tokens."""
    seen = (x - sae.b_dec).reshape(-1, x.shape[-1])
    return Encoder(seen, sae.encoder.weight, sae.encoder.bias)


def decode_codes(sae: Linear, codes: Codes, shape: torch.Size) -> Tensor:
    """Decode the codes of inputs or activations of that shape."""
    return (codes.decode(sae.decoder.weight.T) + sae.b_dec).view(*shape[:-1], -1)


def decode(self: Linear, x: Tensor) -> Tensor:
    """Decode activations, through the codes attached to them if there are any."""
    codes = None if has_hooks(self.decoder) else lookup_codes(x)
    return self.decoder(x) + self.b_dec if codes is None else decode_codes(self, codes, x.shape)


def forward(self: Any, x: Tensor, output_features: bool = False) -> Any:
    """Skips dense activations unless they are requested or hooked."""
    if output_features or not uses_fast_path(self, x) or has_hooks(self.decoder):
        return library_class(self).forward(self, x, output_features)
    return decode_codes(self, self.codes(x), x.shape)


class FastAutoEncoderTopK(AutoEncoderTopK):
    decode, forward = decode, forward

    def encode(self, x: Tensor, return_topk: bool = False, use_threshold: bool = False) -> Any:
        if use_threshold or not uses_fast_path(self, x):
            return super().encode(x, return_topk, use_threshold)
        shape = *x.shape[:-1], self.dict_size
        if not return_topk:
            return to_dense(self.codes(x), shape)
        encoder, k = encoder_of(self, x), int(self.k)
        post = encoder.pre_activations().relu_()
        indices = topk_indices(post, k)
        values = encoder.gather(post, indices).relu()
        codes = Codes(values, indices, self.dict_size)
        dense = attach_codes(to_dense(codes, shape), codes)  # the trainer decodes it unchanged
        top = (part.view(*shape[:-1], k) for part in (values, indices))
        return dense, *top, post.view(shape)

    def codes(self, x: Tensor) -> Codes:
        return Codes(*encode_topk(*encoder_of(self, x), int(self.k)), self.dict_size)


class FastBatchTopKSAE(BatchTopKSAE):
    decode, forward = decode, forward

    def encode(self, x: Tensor, return_active: bool = False, use_threshold: bool = True) -> Any:
        # the library keeps k x.size(0) latents, whatever the other dimensions are
        if not uses_fast_path(self, x) or use_threshold == return_active or x.dim() != 2:
            return super().encode(x, return_active, use_threshold)
        shape = *x.shape[:-1], self.dict_size
        if use_threshold:
            return to_dense(self.codes(x), shape)
        encoder = encoder_of(self, x)
        post = encoder.pre_activations().relu_()
        codes = encoder.batch_topk(post, int(self.k) * len(x))
        dense = attach_codes(to_dense(codes, shape), codes)  # the trainer decodes it unchanged
        return dense, dense.sum(0) > 0, post

    def codes(self, x: Tensor) -> Codes:
        """Codes above the threshold, which is negative until it has been estimated."""
        threshold = self.threshold.clamp(min=0).expand(self.dict_size)
        found = SparsePre.above(*encoder_of(self, x), threshold)
        return found.codes(found.pre)


class FastJumpReluAutoEncoder(JumpReluAutoEncoder):
    """Inference only: the library's trainer computes dense pre-activations itself."""

    def encode(self, x: Tensor, output_pre_jump: bool = False) -> Any:
        if output_pre_jump or not worth_accelerating(self, x):
            return super().encode(x, output_pre_jump)
        return to_dense(self.codes(x), (*x.shape[:-1], self.dict_size))

    def codes(self, x: Tensor) -> Codes:
        seen = x - self.b_dec if self.apply_b_dec_to_input else x
        seen, threshold = seen.reshape(-1, self.activation_dim), self.threshold.clamp(min=0)
        found = SparsePre.above(seen, self.W_enc.T, self.b_enc, threshold)
        return found.codes(found.pre)

    def decode(self, f: Tensor) -> Tensor:
        codes = lookup_codes(f)
        return super().decode(f) if codes is None else self.decode_codes(codes, f.shape)

    def decode_codes(self, codes: Codes, shape: torch.Size) -> Tensor:
        return (codes.decode(self.W_dec) + self.b_dec).view(*shape[:-1], -1)

    def forward(self, x: Tensor, output_features: bool = False) -> Any:
        if output_features or not worth_accelerating(self, x):
            return super().forward(x, output_features)
        return self.decode_codes(self.codes(x), x.shape)
