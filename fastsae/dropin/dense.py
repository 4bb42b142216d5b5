"""Dense tensors that other libraries pass around, with the sparse codes behind them.

Their encoders return pre-activations and codes of all latents, [N, d_sae]. Whoever looks at these
sees them; gradients and decoders go by the few entries that count.
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

FEW = 1 / 4
"""Part of the latents up to which only those that have a gradient are multiplied for it."""

FEWEST = 128
"""Tokens up to which a dense product costs less than what our ops do first."""


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
        if not torch.is_grad_enabled():  # a gradient of 0 can have a derivative of its own
            some = g.any(0).nonzero()[:, 0]
            latents = some if len(some) <= FEW * len(W_enc) else latents
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


def pre_activations(
    x: Float[Tensor, "N d_in"], W_enc: Float[Tensor, "d_sae d_in"], b_enc: Float[Tensor, " d_sae"]
) -> Float[Tensor, "N d_sae"]:
    """x W_enc^T + b_enc, whose gradient is computed for those latents only that have one.

    A loss on dead latents then costs what they cost.
    """
    return _PreActivations.apply(x, W_enc, b_enc)


def entries(
    pre: Float[Tensor, "N d_sae"],
    indices: Int[Tensor, "N K"],
    x: Float[Tensor, "N d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
) -> Float[Tensor, "N K"]:
    """Some entries of the pre-activations of x, with a sparse gradient of their own."""
    return _Entries.apply(x, W_enc, b_enc, pre.detach(), indices)


def largest_of_batch(
    pre: Float[Tensor, "N d_sae"], total: int, encoder: tuple[Tensor, Tensor, Tensor]
) -> Codes:
    """Codes of the largest pre-activations of a whole batch, of those that are above 0.

    encoder: the tokens, weight and bias that pre is of.
    """
    (N, d_sae), (values, tokens, latents) = pre.shape, topk_batch(pre.detach(), total)
    kept = values > 0
    found = in_rows(values[kept], (tokens * d_sae + latents)[kept], N, d_sae)
    values = entries(pre, found.indices, *encoder).where(found.listed, 0.0)
    return Codes(values, found.indices, d_sae)


def above(
    pre: Float[Tensor, "N d_sae"],
    threshold: Float[Tensor, " d_sae"],
    encoder: tuple[Tensor, Tensor, Tensor],
) -> SparsePre:
    """The pre-activations that exceed their latent's threshold, or all if those are many."""
    N, d_sae = pre.shape
    if not is_dense(*encoder, threshold):
        wide = threshold.to(torch.promote_types(pre.dtype, torch.float32)).contiguous()
        found = in_rows(*list_above(pre.detach(), wide, "value"), N, d_sae)
        if found.indices.shape[1] <= WIDEST * d_sae:
            return SparsePre(
                entries(pre, found.indices, *encoder), found.indices, found.listed, d_sae
            )
    return SparsePre(pre, None, pre > threshold, d_sae)


def written_out(codes: Codes, shape: tuple[int, ...]) -> Tensor:
    """The codes as a dense tensor of that shape, for people: it remembers them only if it has no
    gradient, for they may ask for that of all latents."""
    dense = codes.to_dense().view(shape)
    return dense if dense.requires_grad else remember(dense, codes)


class Memory(NamedTuple):
    """Codes, and what their tensor was like when they were all of it."""

    codes: Codes
    version: int
    requires_grad: bool


_memories = WeakTensorKeyDictionary()


def remember(dense: Tensor, codes: Codes) -> Tensor:
    """Let `codes_behind` find the codes, until someone writes into the tensor in a way that torch
    counts, or asks for its gradient."""
    if not torch.compiler.is_compiling() and not dense.is_inference():  # whose writes nobody counts
        _memories[dense] = Memory(codes, dense._version, dense.requires_grad)
    return dense


def codes_behind(dense: Tensor) -> Codes | None:
    """The codes that a tensor was made from, or None where they are unknown or no longer it."""
    if torch.compiler.is_compiling() or dense not in _memories:
        return None
    memory = _memories[dense]
    same = (memory.version, memory.requires_grad) == (dense._version, dense.requires_grad)
    return memory.codes if same else None


def hooked(*modules: nn.Module) -> bool:
    """Whether someone looks at what goes through one of the modules, or changes it."""
    names = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    return any(getattr(module, name) for module in modules for name in names)


def gains(module: object, x: Tensor) -> bool:
    """Whether our ops serve x: enough tokens, no autocast, and no method that someone replaced."""
    enough = x.shape[:-1].numel() > FEWEST
    return enough and not replaced(module) and not torch.is_autocast_enabled(x.device.type)


def replaced(module: object) -> bool:
    """Whether someone put methods of their own into the object."""
    return bool({"encode", "decode", "encode_with_hidden_pre"} & vars(module).keys())
