"""Accelerated classes of SAELens."""

from typing import Any, cast

import torch
from sae_lens.saes.batchtopk_sae import BatchTopK, BatchTopKTrainingSAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUTrainingSAE
from sae_lens.saes.topk_sae import TopK, TopKSAE, TopKTrainingSAE
from torch import Tensor

from fastsae.codes import Codes, at_latents
from fastsae.nn.jumprelu import jumprelu_codes, with_thresholds
from fastsae.nn.sparse_pre import SparsePre
from fastsae_kernels import encode_topk, topk_indices

from .dense import Encoder, attach_codes, has_hooks, lookup_codes, to_dense, worth_accelerating

Library = cast(Any, object)  # type checkers let a mixin of its classes use all of their members


class Fast(Library):
    """Mixin with what all accelerated classes share."""

    activation: type
    """The class of activation_fn, unless it was replaced."""

    def codes(self, encoder: Encoder) -> Codes:
        """The codes of the tokens, with sparse gradients; each class implements it."""
        raise NotImplementedError

    def uses_fast_path(self, x: Tensor) -> bool:
        """Whether fastsae's ops can encode x: nothing was customized or hooked."""
        plain = type(self.activation_fn) is self.activation
        hooks = has_hooks(self.hook_sae_acts_pre, self.activation_fn)
        return plain and not hooks and worth_accelerating(self, x)

    @property
    def by_norm(self) -> bool:
        """Whether pre-activations are scaled by the norm of the decoder row."""
        return getattr(self.cfg, "rescale_acts_by_decoder_norm", False)

    def encoder_of(self, x: Tensor) -> tuple[Encoder, tuple[int, ...]]:
        """The encoder with its tokens, and the shape of the dense activations."""
        seen = self.process_sae_in(x)
        W_enc, b_enc = self.W_enc.T, self.b_enc
        if self.by_norm:
            norm = self.W_dec.norm(dim=-1)
            W_enc, b_enc = W_enc * norm[:, None], b_enc * norm
        shape = *seen.shape[:-1], len(W_enc)
        return Encoder(seen.reshape(-1, seen.shape[-1]), W_enc, b_enc), shape

    def encode(self, x: Tensor) -> Tensor:
        if not self.uses_fast_path(x):
            return super().encode(x)
        encoder, shape = self.encoder_of(x)
        return self.hook_sae_acts_post(self.dense(self.codes(encoder), shape))

    def dense(self, codes: Codes, shape: tuple[int, ...]) -> Tensor:
        """The codes in the library's form."""
        return to_dense(codes, shape)

    def decode(self, feature_acts: Tensor) -> Tensor:
        codes = lookup_codes(feature_acts)
        if codes is None:
            return super().decode(feature_acts)
        return self.decode_codes(codes, feature_acts.shape)

    def forward(self, x: Tensor) -> Tensor:
        if not self.uses_fast_path(x) or self.use_error_term or has_hooks(*self.hook_dict.values()):
            return super().forward(x)
        encoder, shape = self.encoder_of(x)
        return self.decode_codes(self.codes(encoder), shape)

    def decode_codes(self, codes: Codes, shape: tuple[int, ...]) -> Tensor:
        """Decode the codes of activations of that shape."""
        if self.by_norm:
            scale = at_latents(1 / self.W_dec.norm(dim=-1), codes.indices)
            codes = codes._replace(values=codes.values * scale)
        recon = (codes.decode(self.W_dec) + self.b_dec).view(*shape[:-1], -1)
        recon = self.run_time_activation_norm_fn_out(self.hook_sae_recons(recon))
        return self.reshape_fn_out(recon, self.d_head)


class FastTopKSAE(Fast, TopKSAE):
    activation = TopK

    def codes(self, encoder: Encoder) -> Codes:
        return Codes(*encode_topk(*encoder, self.activation_fn.k), self.cfg.d_sae)


class FastJumpReLUSAE(Fast, JumpReLUSAE):
    activation = torch.nn.ReLU

    def codes(self, encoder: Encoder) -> Codes:
        found = SparsePre.above(*encoder, self.threshold.clamp(min=0))
        return found.codes(found.pre)


class FastTraining(Fast):
    """Training classes also return the pre-activations of all latents."""

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self.uses_fast_path(x):
            return super().encode_with_hidden_pre(x)
        encoder, shape = self.encoder_of(x)
        pre = encoder.pre_activations()
        codes = self.codes_among(pre, encoder)
        acts = self.dense(codes, shape)
        if not has_hooks(self.hook_sae_acts_post):  # then nothing reads them before the loss
            attach_codes(acts, codes)
        return self.hook_sae_acts_post(acts), pre.view(shape)

    def codes_among(self, pre: Tensor, encoder: Encoder) -> Codes:
        """The codes, given all pre-activations; each training class implements it."""
        raise NotImplementedError

    def codes(self, encoder: Encoder) -> Codes:
        return self.codes_among(encoder.pre_activations(), encoder)


class FastTopKTrainingSAE(FastTraining, TopKTrainingSAE):
    activation = TopK

    def codes_among(self, pre: Tensor, encoder: Encoder) -> Codes:
        indices = topk_indices(pre, self.activation_fn.k)
        return Codes(encoder.gather(pre, indices).relu(), indices, pre.shape[1])

    def dense(self, codes: Codes, shape: tuple[int, ...]) -> Tensor:
        if not self.activation_fn.use_sparse_activations:
            return to_dense(codes, shape)
        tokens = torch.arange(len(codes.values), device=codes.values.device)
        place = torch.unravel_index(tokens, shape[:-1])
        place = [part.repeat_interleave(codes.values.shape[1]) for part in place]
        where = torch.stack([*place, codes.latents().flatten()])
        return torch.sparse_coo_tensor(where, codes.values.flatten(), shape)


class FastBatchTopKTrainingSAE(FastTraining, BatchTopKTrainingSAE):
    activation = BatchTopK

    def codes_among(self, pre: Tensor, encoder: Encoder) -> Codes:
        return encoder.batch_topk(pre, int(self.activation_fn.k * len(pre)))


class FastJumpReLUTrainingSAE(FastTraining, JumpReLUTrainingSAE):
    activation = torch.nn.ReLU  # created by SAELens but unused

    def uses_fast_path(self, x: Tensor) -> bool:
        """Not with gradients for inactive latents."""
        return super().uses_fast_path(x) and not self.cfg.jumprelu_ste_to_input

    def codes_among(self, pre: Tensor, encoder: Encoder) -> Codes:
        threshold = self.threshold.to(pre.dtype)
        found = encoder.above(pre, threshold.detach() - self.bandwidth / 2)
        return jumprelu_codes(found, *with_thresholds(found, threshold), self.bandwidth)
