"""The entries of a sparse code in the order of their latents, and sums over each latent's.

    sum_runs(w, x, runs)    out[f] = sum over the entries e of latent f of w[e] * x[token[e]]

This is how weight gradients are summed without atomics: a stable sort gives every latent's tokens
in one run and one order. Where a few latents fire on many tokens, one program each would leave the
GPU idle; so every aligned chunk of entries that belongs to one latent as a whole is summed first,
by a program of its own, and the latent's program adds up chunks.
Shapes: N tokens, K active latents per token, F latents, D width.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag
from torch.utils.weak import TensorWeakRef

from ._launch import use_triton


class LatentMajor(NamedTuple):
    """The N * K entries of a code in latent order, each latent's in token order."""

    entry: Tensor
    """int64 [N * K]: where the entry stood in the flattened [N, K] code."""

    token: Tensor
    """int32 [N * K]: the token it belongs to."""

    latent: Tensor
    """int32 [N * K]: the latent it belongs to; F for entries that are left out, at the end."""

    start: Tensor
    """int32 [F + 1]: latent f owns entries start[f] up to start[f + 1]."""


def latent_major(indices: Tensor, F: int, active: Tensor | None = None) -> LatentMajor:
    """Sort the entries of a code by latent, stably: [N, K] -> LatentMajor.

    Given `active`, a mask of them, the other entries are left out.
    """
    latent = indices.int()  # sorts in half the time
    if active is not None:
        latent = latent.where(active, F)
    latent, entry = latent.flatten().sort(stable=True)
    each = torch.arange(F + 1, device=latent.device, dtype=torch.int32)
    start = torch.searchsorted(latent, each, out_int32=True)
    token = torch.empty_like(latent)
    torch.floor_divide(entry, max(indices.shape[1], 1), out=token)  # rounds and casts in one pass
    return LatentMajor(entry, token, latent, start)


class _Latest(NamedTuple):
    """What the indices of a backward pass were sorted to, for as long as they live."""

    indices: TensorWeakRef
    backward_pass: int
    F: int
    runs: LatentMajor


_latest: _Latest | None = None


def latent_major_once(indices: Tensor, F: int) -> LatentMajor:
    """latent_major, without sorting a tensor again in one backward pass: its weight gradients have
    their indices in common. Elsewhere, where these may change in between, it sorts every time."""
    global _latest
    last, backward_pass = _latest, torch._C._current_graph_task_id()
    if last and (last.backward_pass, last.F) == (backward_pass, F) and last.indices() is indices:
        return last.runs
    runs = latent_major(indices, F)
    _latest = None if backward_pass < 0 else _Latest(TensorWeakRef(indices), backward_pass, F, runs)
    return runs


# --- torch path: what runs without a GPU ----------------------------------------------------


def _sum_runs_torch(weights: Tensor, x: Tensor, runs: LatentMajor, rows: slice) -> Tensor:
    low, high = int(runs.start[rows.start]), int(runs.start[rows.stop])
    offsets = runs.start[rows] - low
    weights, token = weights[low:high].to(x.dtype), runs.token[low:high]
    return embedding_bag(token, x, offsets, per_sample_weights=weights, mode="sum")


# --- for ops ---------------------------------------------------------------------------------


def sum_runs(weights: Tensor, x: Tensor, runs: LatentMajor, rows: slice | None = None) -> Tensor:
    """scatter_outer for a caller that keeps the entries in latent order.

    weights [N * K] = values.flatten()[runs.entry], x [N, D] -> [F, D], or some of those rows. Not
    differentiable.
    """
    if use_triton(x):
        from ._latent_major_kernel import launch_sum_runs as run
    else:
        run = _sum_runs_torch
    return run(weights, x, runs, rows or slice(0, len(runs.start) - 1))
