"""Dense tensors that other libraries pass around, with the sparse codes behind them.

Their encoders return pre-activations and codes of all latents, [N, d_sae]. Whoever looks at these
sees them; gradients and decoders go by the few entries that count.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.functional import linear

from fastsae.codes import Codes, every_latent
from fastsae.nn.candidates import Candidates, crowded
from fastsae_kernels import topk_batch
from fastsae_kernels.encode import straight_through
from fastsae_kernels.encode_above import in_rows, inside, list_above

FEW = 1 / 4
"""Part of the latents up to which a product over those that have a gradient is the faster one."""


class _PreActivations(Function):
    @staticmethod
    def forward(ctx, x, W_enc, b_enc):
        ctx.save_for_backward(x, W_enc)
        return linear(x, W_enc, b_enc)

    @staticmethod
    def backward(ctx, *gradients):
        (g,), (x, W_enc) = gradients, ctx.saved_tensors
        latents = g.any(0).nonzero()[:, 0]
        if len(latents) > FEW * len(W_enc):
            g = g.to(W_enc.dtype)
            return g @ W_enc, g.T @ x, g.sum(0)
        g, d_W_enc = g[:, latents].to(W_enc.dtype), torch.zeros_like(W_enc)
        d_W_enc[latents] = g.T @ x
        d_b_enc = g.new_zeros(len(W_enc)).index_copy_(0, latents, g.sum(0))
        return g @ W_enc[latents], d_W_enc, d_b_enc


class _Entries(Function):
    @staticmethod
    def forward(ctx, x, W_enc, b_enc, pre, indices):
        ctx.save_for_backward(x, W_enc, indices)
        return pre.gather(1, indices)

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
    _, indices, count = in_rows(values[kept], (tokens * d_sae + latents)[kept], N, d_sae)
    values = entries(pre, indices, *encoder).where(inside(count, indices.shape[1]), 0.0)
    return Codes(values, indices, d_sae)


def above(
    pre: Float[Tensor, "N d_sae"],
    threshold: Float[Tensor, " d_sae"],
    encoder: tuple[Tensor, Tensor, Tensor],
) -> Candidates:
    """The pre-activations that exceed their latent's threshold, or all if those are many."""
    N, d_sae = pre.shape
    if crowded(*encoder, threshold):
        return Candidates(pre, every_latent(N, d_sae, pre.device), pre > threshold, d_sae)
    threshold = threshold.to(torch.promote_types(pre.dtype, torch.float32)).contiguous()
    _, indices, count = in_rows(*list_above(pre.detach(), threshold, "value"), N, d_sae)
    listed = entries(pre, indices, *encoder)
    return Candidates(listed, indices, inside(count, indices.shape[1]), d_sae)


def written_out(codes: Codes, shape: tuple[int, ...]) -> Tensor:
    """The codes as a dense tensor of that shape, for people: it remembers them only if it has no
    gradient, for they may ask for that of all latents."""
    dense = codes.to_dense().view(shape)
    return dense if dense.requires_grad else remember(dense, codes)


def remember(dense: Tensor, codes: Codes) -> Tensor:
    """Let `codes_behind` find the codes for as long as nobody writes into the tensor."""
    if not dense.is_inference():  # whose changes are not counted
        vars(dense)["codes"] = codes, dense._version
    return dense


def codes_behind(dense: Tensor) -> Codes | None:
    """The codes that a tensor was made from, or None where they are unknown or no longer it."""
    codes, version = vars(dense).get("codes", (None, None))
    return codes if codes is not None and dense._version == version else None


def hooked(*modules: nn.Module) -> bool:
    """Whether someone looks at what goes through one of the modules, or changes it."""
    names = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    return any(getattr(module, name) for module in modules for name in names)
