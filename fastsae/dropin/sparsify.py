"""The accelerated SparseCoder of EleutherAI's sparsify."""

import torch
from sparsify.fused_encoder import EncoderOutput
from sparsify.sparse_coder import ForwardOutput, SparseCoder
from torch import Tensor

from fastsae.nn.linear import autocast
from fastsae_kernels import decode, encode_topk, topk_indices

from .dense import Encoder, has_overridden_methods


class FastSparseCoder(SparseCoder):
    """Computes the pre-activations of all latents only for a loss that uses them."""

    exact_compat = False

    def encode(self, x: Tensor) -> EncoderOutput:
        if x.dim() != 2:
            return super().encode(x)
        encoder = self.encoder_of(x)
        pre_acts = encoder.pre_activations().relu_()
        indices = self.selected(pre_acts.detach())
        values = encoder.gather(pre_acts, indices)
        if self.exact_compat:
            return EncoderOutput(values, indices, pre_acts.detach())
        values = values.relu()
        return EncoderOutput(values, active_only(values, indices), pre_acts)

    def selected(self, pre_acts: Tensor) -> Tensor:
        """Indices of the k latents of each token that are kept."""
        k = self.cfg.k
        if self.cfg.activation == "groupmax":  # the largest of each of k groups of neighbors
            group = pre_acts.shape[1] // k
            first = torch.arange(0, pre_acts.shape[1], group, device=pre_acts.device)
            return first + pre_acts.unflatten(1, (k, group)).max(-1).indices
        if self.exact_compat:  # sparsify's own op, to break ties among zeros as it does
            return pre_acts.topk(k, sorted=False).indices
        return topk_indices(pre_acts, k)

    def encoder_of(self, x: Tensor) -> Encoder:
        """The encoder with the tokens as it sees them."""
        seen = x if self.cfg.transcode else x - self.b_dec
        return Encoder(*autocast(seen, self.encoder.weight, self.encoder.bias))

    def decode(self, top_acts: Tensor, top_indices: Tensor) -> Tensor:
        assert self.W_dec is not None, "this SparseCoder has no decoder"
        return decode(top_acts.to(self.dtype), top_indices, self.W_dec) + self.b_dec

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        dead_mask: Tensor | None = None,
        total_variance: Tensor | None = None,
    ) -> ForwardOutput:
        dead = dead_mask is not None and bool(dead_mask.any())
        if dead or self.cfg.multi_topk or has_overridden_methods(self, "encode", "decode"):
            return super().forward(x, y, dead_mask=dead_mask, total_variance=total_variance)
        low = torch.cuda.is_bf16_supported()  # sparsify's own condition
        with torch.autocast("cuda", torch.bfloat16, enabled=low):
            if self.exact_compat or self.cfg.activation != "topk":
                values, indices, _ = self.encode(x)
            else:
                values, indices = encode_topk(*self.encoder_of(x), self.cfg.k)
                indices = active_only(values, indices)
            y = x if y is None else y
            recon = self.decode(values, indices)
            if self.W_skip is not None:
                recon = recon + x.to(self.dtype) @ self.W_skip.mT
            if total_variance is None:
                total_variance = (y - y.mean(0)).pow(2).sum()
            fvu, none = (y - recon).pow(2).sum() / total_variance, recon.new_zeros(())
        return ForwardOutput(recon, values, indices, fvu, none, none)


def active_only(values: Tensor, indices: Tensor) -> Tensor:
    """Indices whose inactive entries repeat the token's largest latent: sparsify's trainer counts
    every listed latent as fired."""
    return indices.where(values > 0, indices.gather(1, values.argmax(1, keepdim=True)))
