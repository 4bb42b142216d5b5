"""Checks of the rotation trick's gradients."""

from collections.abc import Callable, Iterator
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor

from fastsae_kernels.rotation import rotation_gradients, rotation_gradients_reference
from fastsae_kernels.topk import topk_reference

from .checks import Case, Check, bf16, few, fp32, label, no_worse, short
from .data import Problem


def rotation_case(p: Problem, dtype: torch.dtype, mode: str, dense: bool = False) -> Case:
    """Detached; `dense` compares with the dense formula, where explicit matrices would not fit."""

    def detached(function: Callable) -> Callable:
        def run(*arguments):
            with torch.no_grad():
                return function(*(a.detach() for a in arguments), mode)

        return run

    x, W_enc, b_enc = p.normal(p.N, p.D), p.weights(fp32), p.normal(p.F)
    values, indices = topk_reference(torch.addmm(b_enc, x, W_enc.t()), p.K)
    d_recon, d_values = p.normal(p.N, p.D), p.normal(p.N, p.K)
    tensors = x, W_enc, b_enc, p.weights(fp32), values, indices, d_recon, d_values
    reference = rotation_dense if dense else rotation_gradients_reference
    low = tuple(t.to(dtype) if t.is_floating_point() else t for t in tensors)
    return detached(rotation_gradients), detached(reference), low


def rotation_dense(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, values: Tensor, indices: Tensor,
    d_recon: Tensor, d_values: Tensor, mode: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dh = a g + b h / |h| + c q / |q| of rotation.py, with all of h, q and g written out."""
    h = torch.addmm(b_enc, x, W_enc.t())
    q, g = (torch.zeros_like(h).scatter_(1, indices, t) for t in (values, d_values))
    active = q != 0
    g.mul_(active).addmm_(d_recon, W_dec.t())
    if mode == "support":
        g.mul_(active)
    none = ~active.any(1, keepdim=True)
    h_norm, q_norm = (t.norm(dim=1, keepdim=True).masked_fill(none, 1) for t in (h, q))
    a = (q_norm / h_norm).masked_fill(none, 0)
    qg = (q * g).sum(1, keepdim=True) / q_norm
    s = ((h * g).sum(1, keepdim=True) / h_norm + qg) / (1 + a)
    dh = g.mul_(a).addcmul_(h, a * (2 * qg - s) / h_norm).addcmul_(q, -a * s / q_norm)
    return dh @ W_enc, dh.t() @ x, dh.sum(0)


def rotation_checks(problems: list[Problem]) -> Iterator[Check]:
    small = Problem("", 37, 5, 20, 3, problems[0].device)
    for mode in ("support", "dense"):
        for way in ("gram", "dense"):
            choose = patch(
                "fastsae_kernels.rotation.gram_is_cheaper", lambda *_, w=way: w == "gram"
            )
            for dtype in (fp32, bf16):
                run = choose(partial(no_worse, rotation_case, small, dtype, mode=mode))
                yield Check("rotation", label(small, "rotation", mode, way, short(dtype)), run)
        for p in problems:
            real = few(p)._replace(F=min(p.F, 4 * p.D))
            run = choose(partial(no_worse, rotation_case, real, fp32, mode=mode, dense=True))
            yield Check("rotation", label(real, "rotation", mode, way, "fp32"), run)
