"""Accelerated classes of SAELens for training, which also return all pre-activations."""

from collections.abc import Iterator
from typing import Any

import torch
from sae_lens.saes.abstopk_sae import AbsTopK, AbsTopKTrainingSAE
from sae_lens.saes.batchtopk_sae import BatchTopK, BatchTopKTrainingSAE
from sae_lens.saes.gated_sae import GatedTrainingSAE
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE
from sae_lens.saes.standard_sae import StandardTrainingSAE
from sae_lens.saes.topk_sae import TopK, TopKTrainingSAE
from torch import Tensor

from fastsae.codes import Codes, at_latents
from fastsae.dropin.dense import (
    Encoder,
    attach,
    has_hooks,
    has_overridden_methods,
    lookup,
    to_dense,
)
from fastsae.nn.jumprelu import jumprelu_codes, with_thresholds
from fastsae.nn.sparse_pre import SparsePre
from fastsae_kernels import jumprelu_l0, topk_indices

from .base import Above, Fast, Gates, PlainReLU

Losses = dict[str, Tensor]


class FastTraining(Fast):
    """Mixin of classes that return codes and pre-activations of all latents."""

    def encode(self, x: Tensor) -> Tensor:
        if has_overridden_methods(self, "encode_with_hidden_pre"):
            return self.encode_with_hidden_pre(x)[0]
        return super().encode(x)

    def library_encode(self, x: Tensor) -> Tensor:
        return super().encode_with_hidden_pre(x)[0]

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self.uses_fast_path(x) or self.stays_dense():
            return super().encode_with_hidden_pre(x)
        encoder, shape = self.encoder_of(x)
        if self.is_dense(encoder):
            return super().encode_with_hidden_pre(x)
        pre = encoder.pre_activations()
        hidden_pre = self.hidden_pre(pre).view(shape)
        codes = self.codes_among(pre, encoder, hidden_pre)
        acts = self.dense(codes, shape)
        if not has_hooks(self.hook_sae_acts_post):  # then nothing reads them before the loss
            attach(acts, codes)
        return self.hook_sae_acts_post(acts), hidden_pre

    def hidden_pre(self, pre: Tensor) -> Tensor:
        """What the library calls pre-activations, from the encoder's."""
        return pre

    def codes_among(self, pre: Tensor, encoder: Encoder, hidden_pre: Tensor) -> Codes:
        """The codes, given all pre-activations; each class implements it. It may attach to
        hidden_pre what the loss needs."""
        raise NotImplementedError

    def codes(self, encoder: Encoder) -> Codes:
        pre = encoder.pre_activations()
        return self.codes_among(pre, encoder, pre.new_empty(0))


class FastTopKTrainingSAE(FastTraining, TopKTrainingSAE):
    activation = TopK

    def codes_among(self, pre: Tensor, encoder: Encoder, hidden_pre: Tensor) -> Codes:
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


class FastAbsTopKTrainingSAE(FastTraining, AbsTopKTrainingSAE):
    activation = AbsTopK

    def codes_among(self, pre: Tensor, encoder: Encoder, hidden_pre: Tensor) -> Codes:
        indices = topk_indices(pre, self.activation_fn.k, by="abs")
        return Codes(encoder.gather(pre, indices), indices, pre.shape[1])


class BatchTopKTraining(FastTraining):
    activation = BatchTopK

    def codes_among(self, pre: Tensor, encoder: Encoder, hidden_pre: Tensor) -> Codes:
        return encoder.batch_topk(pre, int(self.activation_fn.k * len(pre)))


class FastBatchTopKTrainingSAE(BatchTopKTraining, BatchTopKTrainingSAE):
    pass


class FastMatryoshkaBatchTopKTrainingSAE(BatchTopKTraining, MatryoshkaBatchTopKTrainingSAE):
    def _iterable_decode(
        self, feature_acts: Tensor, include_outer_loss: bool = False
    ) -> Iterator[tuple[int, Tensor]]:
        """Reconstructions from the latents below each width, the widest only if asked for."""
        codes = lookup(feature_acts, Codes)
        if codes is None:
            yield from super()._iterable_decode(feature_acts, include_outer_loss)
            return
        widths = self.cfg.matryoshka_widths
        for width in widths if include_outer_loss else widths[:-1]:
            recon = self.times_decoder(codes.below(width)) + self.b_dec
            yield width, self.run_time_activation_norm_fn_out(recon)


class AboveTraining(Above, FastTraining):
    """Mixin of classes in which all latents above a threshold are active."""

    def codes_among(self, pre: Tensor, encoder: Encoder, hidden_pre: Tensor) -> Codes:
        widest = self.limits(pre).widest
        found = self.noted(encoder.above(pre, self.lowest(), widest))
        attach(hidden_pre, found)
        return self.codes_of(found)


class FastStandardTrainingSAE(PlainReLU, AboveTraining, StandardTrainingSAE):
    def calculate_aux_loss(
        self, step_input: Any, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> Losses:
        codes = lookup(feature_acts, Codes)
        if codes is None:
            return super().calculate_aux_loss(step_input, feature_acts, hidden_pre, sae_out)
        weighted = codes.values * at_latents(self.W_dec.norm(dim=1), codes.indices)
        norm = weighted.norm(p=self.cfg.lp_norm, dim=-1)
        return {"l1_loss": (step_input.coefficients["l1"] * norm).mean()}


class FastJumpReLUTrainingSAE(AboveTraining, JumpReLUTrainingSAE):
    def uses_fast_path(self, x: Tensor) -> bool:
        """Not with gradients for inactive latents."""
        return super().uses_fast_path(x) and not self.cfg.jumprelu_ste_to_input

    def lowest(self) -> Tensor:
        """The lower edge of the window in which thresholds have a gradient."""
        return self.threshold.detach().to(self.dtype) - self.bandwidth / 2

    def codes_of(self, found: SparsePre) -> Codes:
        threshold = self.threshold.to(found.pre.dtype)
        return jumprelu_codes(found, *with_thresholds(found, threshold), self.bandwidth)

    def calculate_aux_loss(
        self, step_input: Any, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> Losses:
        found, cfg = lookup(hidden_pre, SparsePre), self.cfg
        plain = cfg.jumprelu_sparsity_loss_mode == "step" and cfg.pre_act_loss_coefficient is None
        if found is None or not plain:
            return super().calculate_aux_loss(step_input, feature_acts, hidden_pre, sae_out)
        threshold = self.threshold.to(hidden_pre.dtype)
        l0 = jumprelu_l0(*with_thresholds(found, threshold), self.bandwidth).sum() / len(found.pre)
        return {"l0_loss": (step_input.coefficients["l0"] * l0).to(hidden_pre.dtype)}


class FastGatedTrainingSAE(Gates, AboveTraining, GatedTrainingSAE):
    def hidden_pre(self, pre: Tensor) -> Tensor:
        return torch.addcmul(self.b_mag, pre, self.r_mag.exp())

    def calculate_aux_loss(
        self, step_input: Any, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> Losses:
        found, x = lookup(hidden_pre, SparsePre), step_input.sae_in
        # the library's gates see inputs that were neither normalized nor cast
        same = self.cfg.normalize_activations not in ("layer_norm", "constant_norm_rescale")
        if found is None or not same or x.dtype != self.dtype:
            return super().calculate_aux_loss(step_input, feature_acts, hidden_pre, sae_out)
        gates = found.codes(found.pre + found.pick(self.b_gate))
        norms = at_latents(self.W_dec.norm(dim=1), gates.indices)
        l1 = (gates.values * norms).sum(dim=-1).mean()
        error = gates.decode(self.W_dec) + self.b_dec - x.reshape(-1, x.shape[-1])
        return {
            "l1_loss": step_input.coefficients["l1"] * l1,
            "auxiliary_reconstruction_loss": error.square().sum(dim=-1).mean(),
        }
