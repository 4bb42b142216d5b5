"""dictionary_learning with our ops."""

from typing import Any

from dictionary_learning.dictionary import JumpReluAutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from torch import Tensor

from fastsae.codes import Codes
from fastsae.nn.candidates import Candidates
from fastsae_kernels import encode_topk
from fastsae_kernels.topk import topk_indices

from .dense import (
    codes_behind,
    entries,
    hooked,
    largest_of_batch,
    pre_activations,
    written_out,
)


def encoder_of(sae: AutoEncoderTopK | BatchTopKSAE, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens as the encoder sees them, its weight and its bias."""
    return (x - sae.b_dec).reshape(-1, x.shape[-1]), sae.encoder.weight, sae.encoder.bias


def decoded(sae: AutoEncoderTopK | BatchTopKSAE, f: Tensor) -> Tensor | None:
    """The reconstruction, where the codes behind f are known and no hook looks at them."""
    codes = codes_behind(f)
    if codes is None or hooked(sae.decoder):
        return None
    return (codes.decode(sae.decoder.weight.T) + sae.b_dec).view(*f.shape[:-1], -1)


class FastAutoEncoderTopK(AutoEncoderTopK):
    def encode(self, x: Tensor, return_topk: bool = False, use_threshold: bool = False) -> Any:
        if use_threshold or hooked(self.encoder):
            return super().encode(x, return_topk, use_threshold)
        encoder, k, shape = encoder_of(self, x), int(self.k), (*x.shape[:-1], self.dict_size)
        if not return_topk:
            return written_out(Codes(*encode_topk(*encoder, k), self.dict_size), shape)
        post = pre_activations(*encoder).relu_()
        indices = topk_indices(post, k)
        values = entries(post, indices, *encoder).relu()
        dense = written_out(Codes(values, indices, self.dict_size), shape)
        top = (part.view(*shape[:-1], k) for part in (values, indices))
        return dense, *top, post.view(shape)

    def decode(self, x: Tensor) -> Tensor:
        recon = decoded(self, x)
        return super().decode(x) if recon is None else recon


class FastBatchTopKSAE(BatchTopKSAE):
    def encode(self, x: Tensor, return_active: bool = False, use_threshold: bool = True) -> Any:
        # the largest of a batch are chosen for k x.size(0) tokens, whatever its other dimensions
        if hooked(self.encoder) or (use_threshold and return_active) or x.dim() != 2:
            return super().encode(x, return_active, use_threshold)
        encoder, shape = encoder_of(self, x), (len(x), self.dict_size)
        if use_threshold:
            found = Candidates.above(*encoder, self.threshold.clamp(min=0).expand(self.dict_size))
            return written_out(found.codes(found.pre), shape)
        post = pre_activations(*encoder).relu_()
        dense = written_out(largest_of_batch(post, int(self.k) * len(x), encoder), shape)
        return (dense, dense.sum(0) > 0, post) if return_active else dense

    def decode(self, x: Tensor) -> Tensor:
        recon = decoded(self, x)
        return super().decode(x) if recon is None else recon


class FastJumpReluAutoEncoder(JumpReluAutoEncoder):
    """Its trainer computes pre-activations and JumpReLU itself: only what it decodes is here."""

    def encode(self, x: Tensor, output_pre_jump: bool = False) -> Any:
        if output_pre_jump:
            return super().encode(x, output_pre_jump)
        seen = x - self.b_dec if self.apply_b_dec_to_input else x
        seen = seen.reshape(-1, self.activation_dim)
        found = Candidates.above(seen, self.W_enc.T, self.b_enc, self.threshold.clamp(min=0))
        return written_out(found.codes(found.pre), (*x.shape[:-1], self.dict_size))

    def decode(self, f: Tensor) -> Tensor:
        codes = codes_behind(f)
        if codes is None:
            return super().decode(f)
        return (codes.decode(self.W_dec) + self.b_dec).view(*f.shape[:-1], -1)
