"""The baseline: a TopK SAE in plain dense PyTorch, as most trainers write it.

It follows fastsae's recipe (arXiv:2406.04093), so that the same data and seed give the same model
up to rounding: linear, torch.topk, scatter, dense decode, dense aux-k, autograd, fused Adam.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fastsae.losses import total_variance
from fastsae.nn import SAE


class DenseTopK(nn.Module):
    """A dense TopK SAE that starts from a copy of an SAE's weights."""

    def __init__(self, sae: SAE):
        super().__init__()
        self.k = sae.activation.cfg.k
        self.W_enc, self.b_enc, self.W_dec, self.b_dec = (
            nn.Parameter(weight.detach().clone()) for weight in sae.weights()[:4]
        )

    def loss(self, x: Tensor, dead: Tensor | None, k_aux: int) -> tuple[Tensor, Tensor, Tensor]:
        """Log FVU plus aux-k / (32 FVU), FVU, and which latents fired; `dead` is a mask."""
        pre = linear(x - self.b_dec, self.W_enc, self.b_enc)
        codes = dense_codes(pre, self.k)
        residual = x - (codes @ self.W_dec + self.b_dec)
        fvu = residual.square().sum() / total_variance(x)
        loss = fvu.log()
        n_dead = 0 if dead is None else int(dead.sum())
        if dead is not None and n_dead:
            k = min(k_aux, n_dead)
            aux_codes = dense_codes(pre.masked_fill(~dead, -torch.inf), k)
            left = residual.detach()
            auxk = (aux_codes @ self.W_dec - left).square().sum() / total_variance(left)
            loss = loss + auxk / 32 * min(n_dead / k_aux, 1) / fvu.detach()
        return loss, fvu.detach(), (codes > 0).any(0)


def dense_codes(pre: Tensor, k: int) -> Tensor:
    """TopK codes with all F latents: [N, F] -> [N, F]"""
    values, indices = pre.topk(k)
    return torch.zeros_like(pre).scatter(1, indices, values.relu())


def dense_step(
    model: DenseTopK, adam: torch.optim.Adam, x: Tensor, dead: Tensor | None, k_aux: int, low=False
) -> tuple[Tensor, Tensor]:
    """One optimization step; returns the FVU before it and which latents fired.

    With `low`, autocast runs the matmuls in bfloat16.
    """
    with torch.autocast(x.device.type, torch.bfloat16, enabled=low):
        loss, fvu, fired = model.loss(x, dead, k_aux)
    adam.zero_grad()
    loss.backward()
    with torch.no_grad():
        W, gradient = model.W_dec, model.W_dec.grad
        assert gradient is not None
        gradient -= (gradient * W).sum(1, keepdim=True) * W
        adam.step()
        W /= W.norm(dim=1, keepdim=True)
    return fvu, fired


def dense_adam(model: DenseTopK, lr: float) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.999), eps=6.25e-10, fused=True)


def rotation_dense(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, values: Tensor, indices: Tensor,
    d_recon: Tensor, d_values: Tensor, mode: str, *_: object,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """rotation_gradients from dense pre-activations and gradients.

    dh = a g + b h / |h| + c q / |q|, as fastsae_kernels/rotation.py derives it.
    """
    h = torch.addmm(b_enc, x, W_enc.t())
    q, g = (torch.zeros_like(h).scatter_(1, indices, t) for t in (values, d_values))
    active = q != 0
    listed = active if mode == "support" else 1
    g.mul_(active).addmm_(d_recon, W_dec.t()).mul_(listed)
    none = ~active.any(1, keepdim=True)
    h_norm, q_norm = (t.norm(dim=1, keepdim=True).masked_fill(none, 1) for t in (h, q))
    a = (q_norm / h_norm).masked_fill(none, 0)
    qg = (q * g).sum(1, keepdim=True) / q_norm
    s = ((h * g).sum(1, keepdim=True) / h_norm + qg) / (1 + a)
    dh = g.mul_(a).addcmul_(h, a * (2 * qg - s) / h_norm).addcmul_(q, -a * s / q_norm)
    dh.mul_(listed)
    return dh @ W_enc, dh.t() @ x, dh.sum(0)
