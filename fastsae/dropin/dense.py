"""Dense activations as other libraries expect them, with the sparse codes attached.

Their encoders return pre-activations and codes of all latents, [N, d_sae]. Callers get these dense
tensors; gradients and decoders only touch the active entries.
"""

from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import Function
from torch.jit._trace import is_tracing
from torch.nn.functional import linear
from torch.nn.modules.module import (
    _has_any_global_hook,  # pyright: ignore[reportPrivateUsage]
)
from torch.utils.weak import WeakTensorKeyDictionary

from fastsae.codes import Codes
from fastsae.nn.sparse_pre import SparsePre
from fastsae_kernels import encode_above, in_rows, list_above, straight_through, topk_batch
from fastsae_kernels.product import processor

T = TypeVar("T")

MAX_SPARSE = 1 / 4
"""Fraction of latents with a gradient up to which the backward pass multiplies only those."""

MIN_TOKENS = 128
"""Up to this many tokens, a dense matmul costs less than the overhead of the sparse ops."""


class Limits(NamedTuple):
    """Fractions of latents that may be active for the token with the most of them: with more, the
    library's dense matmuls are faster than the sparse ops. Chosen in trials with `python -m bench
    accelerate --active`, which prints and does not store them."""

    active: float
    """Of the tokens that are looked at."""

    widest: float
    """Of all tokens of a batch that is listed already: it is less work to go on with its lists."""


LIMITS, INTEL_LIMITS = Limits(1 / 8, 3 / 16), Limits(1 / 20, 3 / 16)
"""On Intel's CPUs, dense matmuls are faster, and reading rows of few latents is not."""

INTEL = processor()[0] == "Intel"

DENSE_BATCHES = 8
"""Batches that take the library's code from a dense one on, of which the others are not examined:
that takes time, too."""

AFTER_OUTLIERS = 50
"""The same after a batch that was listed and then had a token with too many latents: such tokens
may be so few that a look at some tokens misses them."""

COUNTERS = "dense_batches", "dense_batches_without_grad"
"""Attributes of an accelerated module that count such batches, with gradients and without."""

SAMPLE = 32
"""Tokens that decide whether a batch is dense, at most, and at most one in 4 times as many."""


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
        g = g.to(W_enc.dtype)
        latents = few_latents(g)
        if latents is None:
            d_x, d_b_enc = g @ W_enc if need_x else None, g.sum(0) if need_b else None
            if not need_W:
                return d_x, None, d_b_enc
            # as its weight lies in memory, so that autograd need not copy the gradient
            return d_x, (x.T @ g).T if W_enc.stride(0) == 1 else g.T @ x, d_b_enc
        g = g[:, latents]
        d_W_enc = torch.zeros_like(W_enc).index_copy_(0, latents, g.T @ x) if need_W else None
        d_b_enc = g.new_zeros(len(W_enc)).index_copy_(0, latents, g.sum(0)) if need_b else None
        return g @ W_enc[latents] if need_x else None, d_W_enc, d_b_enc


def few_latents(g: Float[Tensor, "N d_sae"]) -> Int[Tensor, " some"] | None:
    """The latents with a gradient, or None if these are many, which few tokens mostly show."""
    if torch.is_grad_enabled():  # a zero gradient can have a nonzero derivative
        return None
    for part in g[:SAMPLE], g:
        some = part.any(0).nonzero()[:, 0]
        if len(some) > MAX_SPARSE * g.shape[1]:
            return None
    return some


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

    @torch.no_grad()
    def is_dense(self, threshold: Float[Tensor, " d_sae"] | float, limit: float) -> bool:
        """Whether more than this fraction of the latents exceed the threshold for some token.

        Judged by tokens spread over the batch, so that it depends on the batch alone, and costs
        1/128 of the encoder GEMM. Synchronizes with a GPU.
        """
        some = self.x[:: max(4 * SAMPLE, len(self.x) // SAMPLE)]
        active = linear(some, self.W_enc, self.b_enc) > threshold
        return active.numel() > 0 and int(active.sum(1).max()) > limit * len(self.W_enc)

    def listed(self, threshold: Float[Tensor, " d_sae"] | float) -> SparsePre:
        """Its pre-activations that exceed their latent's threshold; the others are not stored."""
        return SparsePre.listed(encode_above(*self, threshold), *self)

    def above(
        self,
        pre: Float[Tensor, "N d_sae"],
        threshold: Float[Tensor, " d_sae"] | float,
        widest: float,
    ) -> SparsePre:
        """The same among known pre-activations; all of these, if a token exceeds more than this
        fraction of the thresholds."""
        N, d_sae = pre.shape
        wide = torch.promote_types(pre.dtype, torch.float32)
        wide = torch.as_tensor(threshold, dtype=wide, device=pre.device).expand(d_sae).contiguous()
        found = in_rows(*list_above(pre.detach(), wide, "value"), N, d_sae)
        if found.indices.shape[1] > widest * d_sae:
            return SparsePre(pre, None, pre > threshold, d_sae)
        return SparsePre(self.gather(pre, found.indices), found.indices, found.listed, d_sae)


class AboveThreshold:
    """Mixin of classes in which all latents above a threshold are active. While these are many,
    the library's own code is faster, and runs.

    Which one runs depends on the batches that a module has seen and on the processor, and never on
    time.
    """

    training_part: ClassVar[float] = 1.0
    """Part of the limits up to which the sparse ops are faster in training: less than 1 if the
    library's code is so simple that there is less to save."""

    inference_part: ClassVar[float] = 1.0
    """The same without gradients."""

    def limits(self, x: Tensor) -> Limits:
        """How many latents may be active for the sparse ops to be faster."""
        limits = INTEL_LIMITS if INTEL and x.device.type == "cpu" else LIMITS
        part = self.training_part if torch.is_grad_enabled() else self.inference_part
        return Limits(part * limits.active, part * limits.widest)

    @staticmethod
    def counter() -> str:
        """The attribute that counts the next batches to take the library's code. Evaluations have
        their own, as they have other limits: they do not change which code training runs."""
        return COUNTERS[0 if torch.is_grad_enabled() else 1]

    def lowest(self) -> Tensor | float:
        """The pre-activation that latents must exceed to be listed."""
        return 0.0

    def stays_dense(self) -> bool:
        """Whether the next batch takes the library's code because of one before it. If not,
        `is_dense` examines it; neither is called twice for a batch."""
        counter = self.counter()
        left = vars(self).get(counter, 0)
        vars(self)[counter] = max(left - 1, 0)
        return left > 0

    def is_dense(self, encoder: Encoder) -> bool:
        """Whether the library's own code is faster for these tokens."""
        dense = encoder.is_dense(self.lowest(), self.limits(encoder.x).active)
        if dense:
            vars(self)[self.counter()] = DENSE_BATCHES - 1
        return dense

    def codes(self, encoder: Encoder) -> Codes:
        """The codes of the tokens, with sparse gradients."""
        return self.codes_of(self.listed(encoder))

    def listed(self, encoder: Encoder) -> SparsePre:
        """The pre-activations above the threshold."""
        return self.noted(encoder.listed(self.lowest()))

    def noted(self, found: SparsePre) -> SparsePre:
        """The listed pre-activations; the next batches are dense if a token has too many."""
        widest = self.limits(found.pre).widest * found.d_sae
        if found.indices is None or found.indices.shape[1] > widest:
            vars(self)[self.counter()] = AFTER_OUTLIERS
        return found

    def codes_of(self, found: SparsePre) -> Codes:
        """The codes of the listed pre-activations."""
        return found.codes(found.pre)


def to_dense(codes: Codes, shape: tuple[int, ...]) -> Tensor:
    """The codes as a dense tensor of that shape. They stay attached only if it has no gradient:
    a caller may ask for the gradient of all its entries."""
    dense = codes.to_dense().view(shape)
    return dense if dense.requires_grad else attach(dense, codes)


_attached = WeakTensorKeyDictionary()
"""For dense tensors, what they were made from, their version and requires_grad at that time."""


def attach(dense: Tensor, source: Codes | SparsePre) -> Tensor:
    """Let `lookup` find the codes, or the listed pre-activations, until the tensor is modified in
    place or its gradient is requested. They must not refer to this tensor."""
    if not torch.compiler.is_compiling() and not dense.is_inference():  # those have no version
        _attached[dense] = source, dense._version, dense.requires_grad
    return dense


def lookup(dense: Tensor, kind: type[T]) -> T | None:
    """What a dense tensor was made from, if it is of this kind; None if unknown or no longer equal
    to it."""
    if not _attached or torch.compiler.is_compiling() or dense not in _attached:
        return None
    source, *then = _attached[dense]
    current = then == [dense._version, dense.requires_grad]
    return source if current and isinstance(source, kind) else None


def has_hooks(*modules: nn.Module) -> bool:
    """Whether a hook, of its own or of all modules, sees or may change what passes through one of
    the modules."""
    if _has_any_global_hook():
        return True
    for module in modules:  # a plain loop: in a small SAE's inference, its time counts
        if module._forward_hooks or module._forward_pre_hooks:
            return True
        if module._backward_hooks or module._backward_pre_hooks:
            return True
    return False


def worth_accelerating(x: Tensor) -> bool:
    """Whether fastsae's ops support x and are faster for it: enough tokens, no autocast, and
    neither a trace nor a transform of torch.func, in which sizes cannot depend on the data."""
    if x.shape[:-1].numel() <= MIN_TOKENS or x.is_meta:
        return False
    if not torch.compiler.is_compiling() and (is_tracing() or peek_interpreter_stack()):
        return False
    return not torch.is_autocast_enabled(x.device.type)


def has_overridden_methods(module: Any, *names: str) -> bool:
    """Whether a method was assigned to the object itself, or a subclass of its library's class has
    its own."""
    kind = type(module)
    fast = vars(kind).get("fast", kind)
    return any(
        name in vars(module) or getattr(kind, name, None) is not getattr(fast, name, None)
        for name in names
    )
