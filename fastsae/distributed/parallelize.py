"""Make an SAE one process's share of it: rows of its weights, and of what else is per latent."""

import torch
from torch import Tensor, nn

from fastsae.nn import SAE, Activation
from fastsae.shards import Shards

PER_LATENT = "W_enc", "b_enc", "W_dec"
SUPPORTED = "topk", "batchtopk", "jumprelu", "relu", "gated"
"""Activations whose codes, penalties and state add up over processes."""


def why_not_divided(activation: Activation) -> str | None:
    """Why an SAE with this activation cannot be divided by latents; None if it can."""
    name = activation.cfg.name
    if name not in SUPPORTED:
        return f'activation "{name}"'
    return 'gradient "rotation"' if activation.decodes else None


def parallelize(sae: SAE, shards: Shards) -> SAE:
    """Keep this process's latents of an SAE, in place, and have it work with the other processes.

    An SAE on the meta device, which takes no memory, gets uninitialized weights for the latents of
    this process only. From then on, `sae.encode` returns the codes of these latents, as if the
    others were 0 too; outputs and losses are of all latents. ValueError if the SAE cannot be
    divided, or d_sae is not divisible.
    """
    if shards.size == 1:
        return sae
    if shards.latent > 1 and (reason := why_not_divided(sae.activation)):
        raise ValueError(f"{reason} cannot be divided among processes by its latents")
    rows = shards.rows(sae.d_sae)
    if sae.W_enc.is_meta:
        sae.activation = sae.activation.cfg.build()
        sae.activation.build(sae.d_in, sae.d_sae)
    for name in per_latent(sae, sae.d_sae):
        module, _, own = name.rpartition(".")
        _keep_rows(sae.get_submodule(module), own, rows)
    for name, parameter in list(sae.named_parameters()):
        if parameter.is_meta:
            sae.register_parameter(name, nn.Parameter(torch.zeros(parameter.shape)))
    sae.shards = sae.activation.shards = shards
    return sae


def per_latent(sae: SAE, rows: int | None = None) -> list[str]:
    """Names of the parameters and buffers that have one row for each latent of this process."""
    rows = len(sae.W_enc) if rows is None else rows
    others = sae.activation.state_dict().items()
    sized = [f"activation.{name}" for name, value in others if value.shape[:1] == (rows,)]
    return [*PER_LATENT, *sized]


def _keep_rows(module: nn.Module, name: str, rows: slice) -> None:
    found: Tensor = getattr(module, name)
    own = found.detach()[rows]
    own = torch.empty(own.shape) if own.is_meta else own.clone()
    if isinstance(found, nn.Parameter):
        setattr(module, name, nn.Parameter(own))
    else:
        module.register_buffer(name, own)
