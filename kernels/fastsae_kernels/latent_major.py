"""Sort the entries of a sparse code by latent, and sum over each latent's entries.

    sum_runs(w, x, runs)    out[f] = sum over the entries e of latent f of w[e] * x[token[e]]

This sums weight gradients without atomics: a stable sort puts every latent's tokens into one run,
in a fixed order. If a few latents fire on many tokens, one program per latent would leave the GPU
idle. So each aligned chunk of entries that lies within one latent's run is summed first, by its own
program, and the latent's program adds up its chunks.
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
    """int64 [N * K]: the entry's position in the flattened [N, K] code."""

    token: Tensor
    """int32 [N * K]: its token."""

    latent: Tensor
    """int32 [N * K]: its latent; F for inactive entries, which are at the end."""

    start: Tensor
    """int32 [F + 1]: entries start[f] to start[f + 1] (exclusive) are latent f's."""


def latent_major(indices: Tensor, F: int, active: Tensor | None = None) -> LatentMajor:
    """Stable sort of a code's entries by latent: [N, K] -> LatentMajor.

    With a mask `active` [N, K], the other entries are left out.
    """
    latent = indices.int()  # int32 sorts in half the time
    if active is not None:
        latent = latent.where(active, F)
    latent, entry = latent.flatten().sort(stable=True)
    each = torch.arange(F + 1, device=latent.device, dtype=torch.int32)
    start = torch.searchsorted(latent, each, out_int32=True)
    token = torch.empty_like(latent)
    torch.floor_divide(entry, max(indices.shape[1], 1), out=token)  # rounds and casts in one pass
    return LatentMajor(entry, token, latent, start)


class _Latest(NamedTuple):
    """The last result of a backward pass, with a weak reference to its indices."""

    indices: TensorWeakRef
    backward_pass: int
    F: int
    runs: LatentMajor


_latest: _Latest | None = None


def latent_major_once(indices: Tensor, F: int) -> LatentMajor:
    """latent_major, but sorts a tensor only once per backward pass.

    The weight gradients of one pass share their indices. Outside a backward pass, where indices may
    be changed in place between two calls, it sorts every time.
    """
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


# --- public ---------------------------------------------------------------------------------


def sum_runs(weights: Tensor, x: Tensor, runs: LatentMajor, rows: slice | None = None) -> Tensor:
    """scatter_outer for entries that are sorted by latent already.

    weights [N * K] = values.flatten()[runs.entry], x [N, D] -> [F, D], or only the given rows of
    it. Not differentiable.
    """
    if use_triton(x):
        from ._latent_major_kernel import launch_sum_runs as run
    else:
        run = _sum_runs_torch
    return run(weights, x, runs, rows or slice(0, len(runs.start) - 1))
