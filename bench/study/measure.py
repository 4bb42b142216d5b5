"""What the study measures of an SAE."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.linalg import solve_triangular
from torch.nn.functional import nll_loss

from fastsae import SAE
from fastsae.data import ActivationShards, ActivationSource, Synthetic
from fastsae.data.hookpoints import hookpoints_at, splice
from fastsae.data.model import ModelFiles, load_model, load_tokenizer
from fastsae.data.ordinary import MAX_NORM_RATIO, SAMPLE_TOKENS, Ordinary
from fastsae.evals import reconstruction
from fastsae.evals.downstream import log_probabilities, predicted, replace_text
from fastsae.evals.windows import stored_batches
from fastsae.nn import TopK
from fastsae.nn.init import active_subspace

from .plan import Scale

PURSUIT_TOKENS = 256


class CrossEntropy:
    """Cross-entropy of a causal model, in nats per token, with its activations replaced.

    As `downstream` has it, but what does not depend on the SAE is done once for all SAEs.
    """

    def __init__(self, heldout: ActivationShards, windows: int):
        assert heldout.model is not None and heldout.hookpoint is not None
        files = ModelFiles.of(heldout.harvest)
        self.model = load_model(heldout.model, files=files)
        (self.hookpoint,) = hookpoints_at(self.model, [heldout.hookpoint])
        tokenizer = load_tokenizer(heldout.model, files)
        self.batches = list(stored_batches(heldout, tokenizer, windows, 8))
        self.ordinary = Ordinary.of(heldout.sample(SAMPLE_TOKENS), MAX_NORM_RATIO)
        self.clean = self.of(lambda x: x)
        self.ablated = self.of(self.ordinary.mean.expand_as)

    def recovered(self, sae: SAE) -> float:
        """The part of mean ablation's damage that the SAE avoids."""
        return (self.ablated - self.of(sae)) / (self.ablated - self.clean)

    @torch.no_grad()
    def of(self, replace: Callable[[Tensor], Tensor]) -> float:
        """With ordinary tokens' activations replaced."""

        def changed(x: Tensor) -> Tensor:
            return torch.where(self.ordinary.has(x)[:, None], replace(x), x)

        total, tokens = 0.0, 0
        for batch in self.batches:
            windows = partial(replace_text, batch.keep, changed)
            with splice(self.hookpoint, windows, len(batch.keep)):
                output = self.model(batch.input_ids, attention_mask=batch.attention_mask)
            wanted, found = predicted(batch), log_probabilities(output, batch)
            total += float(nll_loss(found, wanted, reduction="none").double().sum())
            tokens += len(wanted)
        return total / tokens


def tuning_error(sae: SAE, source: ActivationSource, scale: Scale) -> dict[str, Any]:
    """The FVU on held-out tokens, by which a learning rate is chosen."""
    assert source.heldout is not None
    return {"fvu": reconstruction(sae, source.heldout, max_tokens=scale.tokens, pc_ranks=()).fvu}


def measure(
    sae: SAE, source: ActivationSource, scale: Scale, effect: CrossEntropy | None
) -> dict[str, Any]:
    """All metrics of an SAE on held-out tokens."""
    heldout = source.heldout
    assert heldout is not None
    found = reconstruction(sae, heldout, max_tokens=scale.tokens)
    result: dict[str, Any] = {"fvu": found.fvu, "l0": found.l0, "dead": found.dead_fraction}
    result |= {"utilization": found.utilization}
    result |= {"pcr": sum(found.pc_retention.values()) / len(found.pc_retention)}
    x = heldout.sample(4096)
    with torch.no_grad():
        result["components"] = len(active_subspace(sae(x).cpu()))
    cfg = sae.activation.cfg
    if isinstance(sae.activation, TopK) and cfg.gradient != "rotation":
        few = x[:PURSUIT_TOKENS].to(sae.W_dec)
        result["pursuit gap"] = squared_error(sae, few) / pursuit_error(sae, few) - 1
    if effect is not None:
        result["ce recovered"] = effect.recovered(sae)
    if isinstance(source, Synthetic):
        result["recovery"] = source.recovery(sae.W_dec)
    return result


@torch.no_grad()
def squared_error(sae: SAE, x: Tensor) -> float:
    """What an SAE leaves of tokens [N, D]: the sum of squares."""
    return float((x - sae(x)).double().square().sum())


@torch.no_grad()
def pursuit_error(sae: SAE, x: Tensor) -> float:
    """What pursuit with a TopK SAE's decoder leaves of tokens [N, D]: the sum of squares."""
    centered, cfg = (x - sae.b_dec).double(), sae.activation.cfg
    return float((centered - pursuit(centered, sae.W_dec, cfg.k, cfg.by)).square().sum())


def pursuit(x: Tensor, rows: Tensor, k: int, by: str) -> Tensor:
    """What orthogonal matching pursuit reconstructs of tokens [N, D] with k of the rows [F, D].

    The rows should have norm 1. Ranked by value, negative coefficients are set to 0 at the end,
    without a new fit. An encoder could do as well. Rows that the chosen ones span add nothing.
    """
    rows, x = rows.double(), x.double()
    rounding = torch.finfo(x.dtype).eps ** 0.5  # far above it, far below what a new row adds
    chosen = torch.empty(len(x), 0, dtype=torch.long, device=x.device)
    basis, left = x.new_empty(len(x), k, x.shape[1]), x  # of the chosen rows' span, orthonormal
    for j in range(k):
        match = left @ rows.T
        match = (match.abs() if by == "abs" else match).scatter(1, chosen, -torch.inf)
        chosen = torch.cat([chosen, match.argmax(1, keepdim=True)], 1)
        row, before = rows[chosen[:, -1]], basis[:, :j]
        new = row
        for _ in range(2):  # the second time removes what rounding left
            new = new - ((before @ new[:, :, None]) * before).sum(1)
        length = new.norm(dim=1, keepdim=True)
        spanned = length <= rounding * row.norm(dim=1, keepdim=True)
        basis[:, j] = (new / length).masked_fill(spanned, 0.0)
        left = left - (left * basis[:, j]).sum(1, keepdim=True) * basis[:, j]
    atoms = rows[chosen]
    triangle = basis @ atoms.mT
    spanned = torch.diag_embed((basis == 0).all(2).double())  # whose values are then 0
    values = solve_triangular(triangle + spanned, basis @ x[:, :, None], upper=True)
    values = values if by == "abs" else values.clamp_min(0)
    return (values * atoms).sum(1)
