"""Dense activations as other libraries expect them, with the sparse codes attached.

Their encoders return pre-activations and codes of all latents, [N, d_sae]. Callers get these dense
tensors; gradients and decoders only touch the active entries.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.functional import linear
from torch.utils.weak import WeakTensorKeyDictionary

from fastsae.codes import Codes
from fastsae.nn.sparse_pre import WIDEST, SparsePre, is_dense
from fastsae_kernels import in_rows, list_above, straight_through, topk_batch

MAX_SPARSE = 1 / 4
"""Fraction of latents with a gradient up to which the backward pass multiplies only those."""

MIN_TOKENS = 128
"""Up to this many tokens, a dense matmul costs less than the overhead of the sparse ops."""


class _PreActivations(Function):
    @staticmethod
    def forward(x, W_enc, b_enc):
        return linear(x, W_enc, b_enc)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx, *gradients):
        (g,), (x, W_enc) = gradients, ctx.saved_tensors
        need_x, need_W, need_b = ctx.needs_input_grad
        latents = torch.arange(W_enc.shape[0], device=g.device)
        if not torch.is_grad_enabled():  # a zero gradient can have a nonzero derivative
            some = g.any(0).nonzero()[:, 0]
            latents = some if len(some) <= MAX_SPARSE * len(W_enc) else latents
        g = g[:, latents].to(W_enc.dtype)
        d_W_enc = torch.zeros_like(W_enc).index_copy_(0, latents, g.T @ x) if need_W else None
        d_b_enc = g.new_zeros(len(W_enc)).index_copy_(0, latents, g.sum(0)) if need_b else None
        return g @ W_enc[latents] if need_x else None, d_W_enc, d_b_enc


class _Entries(Function):
    @staticmethod
    def forward(x, W_enc, b_enc, pre, indices):
        return pre.gather(1, indices)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, W_enc, _, _, indices = inputs
        ctx.save_for_backward(x, W_enc, indices)

    @staticmethod
    def backward(ctx, *gradients):
        (g,), (x, W_enc, indices) = gradients, ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        return *straight_through(g.to(W_enc.dtype), x, W_enc, indices, needs), None, None


class Encoder(NamedTuple):
    """Tokens as the encoder sees them, its weight and its bias."""

    x: Float[Tensor, "N d_in"]
    W_enc: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, " d_sae"]

    def pre_activations(self) -> Float[Tensor, "N d_sae"]:
        """x W_enc^T + b_enc, whose backward pass skips latents without gradient, as in aux-k
        losses."""
        return _PreActivations.apply(*self)

    def gather(
        self, pre: Float[Tensor, "N d_sae"], indices: Int[Tensor, "N K"]
    ) -> Float[Tensor, "N K"]:
        """pre[n, indices[n, k]] of its own pre-activations, with a sparse gradient."""
        return _Entries.apply(*self, pre.detach(), indices)

    def batch_topk(self, pre: Float[Tensor, "N d_sae"], total: int) -> Codes:
        """Codes of the `total` largest positive of its pre-activations, in a whole batch."""
        (N, d_sae), (values, tokens, latents) = pre.shape, topk_batch(pre.detach(), total)
        kept = values > 0
        found = in_rows(values[kept], (tokens * d_sae + latents)[kept], N, d_sae)
        values = self.gather(pre, found.indices).where(found.listed, 0.0)
        return Codes(values, found.indices, d_sae)

    def above(self, pre: Float[Tensor, "N d_sae"], threshold: Float[Tensor, " d_sae"]) -> SparsePre:
        """Its pre-activations that exceed their latent's threshold, or all if those are many."""
        N, d_sae = pre.shape
        if not is_dense(*self, threshold):
            wide = threshold.to(torch.promote_types(pre.dtype, torch.float32)).contiguous()
            found = in_rows(*list_above(pre.detach(), wide, "value"), N, d_sae)
            if found.indices.shape[1] <= WIDEST * d_sae:
                values = self.gather(pre, found.indices)
                return SparsePre(values, found.indices, found.listed, d_sae)
        return SparsePre(pre, None, pre > threshold, d_sae)


def to_dense(codes: Codes, shape: tuple[int, ...]) -> Tensor:
    """The codes as a dense tensor of that shape. They stay attached only if it has no gradient:
    a caller may ask for the gradient of all its entries."""
    dense = codes.to_dense().view(shape)
    return dense if dense.requires_grad else attach_codes(dense, codes)


_attached = WeakTensorKeyDictionary()
"""For dense tensors, their codes, version and requires_grad at the time of attaching."""


def attach_codes(dense: Tensor, codes: Codes) -> Tensor:
    """Let `lookup_codes` find the codes until the tensor is modified in place or its gradient is
    requested."""
    if not torch.compiler.is_compiling() and not dense.is_inference():  # those have no version
        _attached[dense] = codes, dense._version, dense.requires_grad
    return dense


def lookup_codes(dense: Tensor) -> Codes | None:
    """The codes that a dense tensor was made from; None if unknown or no longer equal to it."""
    if torch.compiler.is_compiling() or dense not in _attached:
        return None
    codes, *then = _attached[dense]
    return codes if then == [dense._version, dense.requires_grad] else None


def has_hooks(*modules: nn.Module) -> bool:
    """Whether a hook sees, or may change, what passes through one of the modules."""
    names = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    return any(getattr(module, name) for module in modules for name in names)


def worth_accelerating(module: object, x: Tensor) -> bool:
    """Whether fastsae's ops are faster for x and nothing prevents them: enough tokens, no autocast,
    no overridden method."""
    enough = x.shape[:-1].numel() > MIN_TOKENS
    autocast = torch.is_autocast_enabled(x.device.type)
    return enough and not has_overridden_methods(module) and not autocast


def has_overridden_methods(module: object) -> bool:
    """Whether methods were assigned to the object itself."""
    return bool({"encode", "decode", "encode_with_hidden_pre"} & vars(module).keys())
