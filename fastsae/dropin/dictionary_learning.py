"""Accelerated classes of dictionary_learning."""

from typing import Any, cast

import torch
from dictionary_learning.dictionary import (
    AutoEncoder,
    AutoEncoderNew,
    Dictionary,
    GatedAutoEncoder,
    JumpReluAutoEncoder,
)
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from torch import Tensor, nn

from fastsae.codes import Codes
from fastsae.nn.sparse_pre import SparsePre
from fastsae_kernels import encode_topk, topk_indices

from .dense import (
    AboveThreshold,
    Encoder,
    attach,
    has_hooks,
    has_overridden_methods,
    lookup,
    to_dense,
    worth_accelerating,
)

Library = cast(Any, Dictionary)
"""What a mixin derives from, so that an object's class can be changed to one that has it; for type
checkers, something that has all the members of the classes."""


class Fast(Library):
    """Mixin with what all accelerated classes share; Matrices and Layers are what it needs."""

    @property
    def output_bias(self) -> Tensor:
        """The bias of the reconstruction."""
        return self.b_dec

    @property
    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """W_enc, b_enc and W_dec; the weights have one row per latent."""
        raise NotImplementedError

    def centered(self, x: Tensor) -> Tensor:
        """What the encoder sees of x."""
        return x - self.output_bias

    def codes(self, encoder: Encoder) -> Codes:
        """The codes of the tokens, with sparse gradients; each class implements it."""
        raise NotImplementedError

    def stays_dense(self) -> bool:
        """Whether the next batch takes the library's code without being examined."""
        return False

    def is_dense(self, encoder: Encoder) -> bool:
        """Whether the library's own code is faster for these tokens."""
        return False

    def examined(self, x: Tensor) -> Encoder | None:
        """The encoder with tokens x; None if the library's own code is to encode them."""
        if not self.uses_fast_path(x) or self.stays_dense():
            return None
        encoder = self.encoder_of(x)
        return None if self.is_dense(encoder) else encoder

    def uses_fast_path(self, x: Tensor) -> bool:
        """Whether fastsae's ops can encode x: nothing was customized or hooked."""
        return worth_accelerating(x)

    def can_decode(self) -> bool:
        """Whether fastsae's ops can decode: nothing was customized or hooked."""
        return True

    def skips_codes(self, x: Tensor) -> bool:
        """Whether the codes between x and its reconstruction are for nobody to see."""
        replaced = has_overridden_methods(self, "encode", "decode")
        return self.uses_fast_path(x) and self.can_decode() and not replaced

    def encoder_of(self, x: Tensor) -> Encoder:
        seen = self.centered(x)
        return Encoder(seen.reshape(-1, seen.shape[-1]), *self.matrices[:2])

    def dense_shape(self, x: Tensor) -> tuple[int, ...]:
        return *x.shape[:-1], self.dict_size

    def encode(self, x: Tensor, *given: Any, **settings: Any) -> Any:
        encoder = None if given or settings else self.examined(x)
        if encoder is None:
            return super().encode(x, *given, **settings)
        return to_dense(self.codes(encoder), self.dense_shape(x))

    def decode(self, f: Tensor, *given: Any, **settings: Any) -> Tensor:
        codes = None if given or settings else lookup(f, Codes)
        if codes is None or not self.can_decode():
            return super().decode(f, *given, **settings)
        return self.decode_codes(codes, f.shape)

    def decode_codes(self, codes: Codes, shape: torch.Size) -> Tensor:
        """Decode the codes of inputs or activations of that shape."""
        return (codes.decode(self.matrices[2]) + self.output_bias).view(*shape[:-1], -1)

    def forward(self, x: Tensor, *given: Any, **settings: Any) -> Any:
        """Skips dense activations unless they are requested or hooked."""
        if given or settings or not self.skips_codes(x):
            return super().forward(x, *given, **settings)
        encoder = self.examined(x)
        if encoder is None:
            return self.decode(super().encode(x))
        return self.decode_codes(self.codes(encoder), x.shape)


class Matrices(Fast):
    """Mixin of classes whose encoder and decoder are matrices. It or Layers must come first among
    the bases: only then can an object's class be changed."""

    @property
    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.W_enc.T, self.b_enc, self.W_dec


class Layers(Fast):
    """Mixin of classes whose encoder and decoder are linear layers."""

    @property
    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.encoder.weight, self.encoder.bias, self.decoder.weight.T

    def uses_fast_path(self, x: Tensor) -> bool:
        if not super().uses_fast_path(x):
            return False
        return type(self.encoder) is nn.Linear and not has_hooks(self.encoder)

    def can_decode(self) -> bool:
        return type(self.decoder) is nn.Linear and not has_hooks(self.decoder)


class Above(AboveThreshold, Fast):
    """Mixin of classes in which all latents above a threshold are active."""


class PlainReLU(Layers, Above):
    """Mixin of classes whose own code is two matmuls and a ReLU."""

    training_part, inference_part = 1 / 2, 1 / 6


class FastAutoEncoder(PlainReLU, AutoEncoder):
    @property
    def output_bias(self) -> Tensor:
        return self.bias

    def forward(self, x: Tensor, output_features: bool = False, ghost_mask: Any = None) -> Any:
        """Its trainers request the activations, which their loss is of, and decode them here."""
        if not output_features and ghost_mask is None:
            return super().forward(x)
        if ghost_mask is not None or not self.skips_codes(x):
            return AutoEncoder.forward(self, x, output_features, ghost_mask)
        encoder = self.examined(x)
        if encoder is None:
            f = AutoEncoder.encode(self, x)
            return self.decode(f), f
        codes = self.codes(encoder)
        return self.decode_codes(codes, x.shape), to_dense(codes, self.dense_shape(x))


class FastAutoEncoderNew(PlainReLU, AutoEncoderNew):
    @property
    def output_bias(self) -> Tensor:
        return self.decoder.bias

    def centered(self, x: Tensor) -> Tensor:
        return x


class FastGatedAutoEncoder(Layers, Above, GatedAutoEncoder):
    """One GEMM serves gates and magnitudes, which differ by scale and bias."""

    @property
    def output_bias(self) -> Tensor:
        return self.decoder_bias

    @property
    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.encoder.weight, torch.zeros_like(self.gate_bias), self.decoder.weight.T

    def lowest(self) -> Tensor:
        return -self.gate_bias.detach()

    def codes_of(self, found: SparsePre) -> Codes:
        magnitude = found.pre * found.pick(self.r_mag.exp()) + found.pick(self.mag_bias)
        return found.codes(magnitude.relu())

    def encode(
        self, x: Tensor, return_gate: bool = False, normalize_decoder: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        if not return_gate or normalize_decoder:
            settings = {"normalize_decoder": True} if normalize_decoder else {}
            settings |= {"return_gate": True} if return_gate else {}
            return super().encode(x, **settings)
        encoder = self.examined(x)
        if encoder is None:
            return GatedAutoEncoder.encode(self, x, True)
        found, shape = self.listed(encoder), self.dense_shape(x)
        codes = self.codes_of(found)
        gates = found.codes(found.pre + found.pick(self.gate_bias))
        dense = attach(to_dense(codes, shape), codes)  # the trainer decodes it unchanged
        return dense, to_dense(gates, shape)


class FastJumpReluAutoEncoder(Matrices, Above, JumpReluAutoEncoder):
    """Inference only: the library's trainer computes dense pre-activations itself."""

    def centered(self, x: Tensor) -> Tensor:
        return x - self.b_dec if self.apply_b_dec_to_input else x

    def lowest(self) -> Tensor:
        return self.threshold.detach().clamp(min=0)


class FastAutoEncoderTopK(Layers, AutoEncoderTopK):
    def codes(self, encoder: Encoder) -> Codes:
        return Codes(*encode_topk(*encoder, int(self.k)), self.dict_size)

    def encode(self, x: Tensor, return_topk: bool = False, use_threshold: bool = False) -> Any:
        if use_threshold or not self.uses_fast_path(x):
            return AutoEncoderTopK.encode(self, x, return_topk, use_threshold)
        if not return_topk:
            return super().encode(x)
        encoder, k, shape = self.encoder_of(x), int(self.k), self.dense_shape(x)
        post = encoder.pre_activations().relu_()
        indices = topk_indices(post, k)
        values = encoder.gather(post, indices).relu()
        codes = Codes(values, indices, self.dict_size)
        dense = attach(to_dense(codes, shape), codes)  # the trainer decodes it unchanged
        top = (part.view(*shape[:-1], k) for part in (values, indices))
        return dense, *top, post.view(shape)


class BatchTopK(Above):
    """Mixin of classes that have a threshold for inference, and keep most of a batch in
    training."""

    def lowest(self) -> Tensor:
        """The threshold, which is negative until it has been estimated."""
        return self.threshold.clamp(min=0).expand(self.dict_size)

    def within(self, codes: Codes) -> Codes:
        """The codes of the latents that are in use."""
        return codes

    def codes_of(self, found: SparsePre) -> Codes:
        return self.within(super().codes_of(found))

    def encode(self, x: Tensor, return_active: bool = False, use_threshold: bool = True) -> Any:
        # the library keeps k x.size(0) latents, whatever the other dimensions are
        if not self.uses_fast_path(x) or use_threshold == return_active or x.dim() != 2:
            return self.library_encode(x, return_active, use_threshold)
        if use_threshold:
            return super().encode(x)
        encoder = self.encoder_of(x)
        post = encoder.pre_activations().relu_()
        codes = self.within(encoder.batch_topk(post, int(self.k) * len(x)))
        dense = to_dense(codes, self.dense_shape(x))
        dense = attach(dense, codes)  # the trainer decodes it unchanged
        return dense, dense.sum(0) > 0, post


class FastBatchTopKSAE(Layers, BatchTopK, BatchTopKSAE):
    library_encode = BatchTopKSAE.encode


class FastMatryoshkaBatchTopKSAE(Matrices, BatchTopK, MatryoshkaBatchTopKSAE):
    """The library's trainer decodes each group of latents itself, densely."""

    library_encode = MatryoshkaBatchTopKSAE.encode

    def uses_fast_path(self, x: Tensor) -> bool:
        # it sets columns to 0, of whichever dimension comes second
        return x.dim() == 2 and super().uses_fast_path(x)

    def within(self, codes: Codes) -> Codes:
        end = int(self.group_indices[self.active_groups])
        return codes if end == self.dict_size else codes.below(end)
