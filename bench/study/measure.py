"""What the study measures of an SAE."""

from typing import Any

import torch
from torch import Tensor

from fastsae import SAE
from fastsae.data import ActivationShards, ActivationSource, Synthetic
from fastsae.evals import CausalEffect, downstream, reconstruction
from fastsae.nn import TopK
from fastsae.nn.init import active_subspace

from .plan import Scale

PURSUIT_TOKENS, PURSUIT_K = 256, 64


def measure(sae: SAE, source: ActivationSource, scale: Scale) -> dict[str, Any]:
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
    if isinstance(sae.activation, TopK) and cfg.k <= PURSUIT_K and cfg.gradient != "rotation":
        x = x[:PURSUIT_TOKENS].to(sae.W_dec)
        with torch.no_grad():
            centered, error = x - sae.b_dec, (x - sae(x)).square().sum()
            best = (centered - pursuit(centered, sae.W_dec, cfg.k, cfg.by)).square().sum()
        result["pursuit gap"] = float(error / best) - 1
    if isinstance(heldout, ActivationShards):
        effect = downstream(sae, heldout, max_windows=scale.windows)
        if isinstance(effect, CausalEffect):
            result["ce recovered"] = effect.recovered_mean
    if isinstance(source, Synthetic):
        result["recovery"] = source.recovery(sae.W_dec)
    return result


def pursuit(x: Tensor, rows: Tensor, k: int, by: str) -> Tensor:
    """What orthogonal matching pursuit reconstructs of tokens [N, D] with k of the rows [F, D].

    Ranked by value, negative coefficients are set to 0 at the end. An encoder could do as well.
    """

    rows, x = rows.double(), x.double()
    chosen, left = torch.empty(len(x), 0, dtype=torch.long, device=x.device), x
    values = x.new_zeros(len(x), 0, 1)
    for _ in range(k):
        match = left @ rows.T
        match = (match.abs() if by == "abs" else match).scatter(1, chosen, -torch.inf)
        chosen = torch.cat([chosen, match.argmax(1, keepdim=True)], 1)
        atoms = rows[chosen]  # [N, j, D]
        gram = atoms @ atoms.mT + 1e-9 * torch.eye(chosen.shape[1]).to(atoms)
        values = torch.linalg.solve(gram, atoms @ x[:, :, None])
        left = x - (values * atoms).sum(1)
    values = values if by == "abs" else values.clamp_min(0)
    return (values * rows[chosen]).sum(1)
