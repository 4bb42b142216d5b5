"""Make an SAE one process's share of it: rows of its weights, and of what else is per latent."""

import torch
from torch import Tensor, nn

from fastsae.nn import SAE
from fastsae.shards import Shards

PER_LATENT = "W_enc", "b_enc", "W_dec"
SUPPORTED = "topk", "batchtopk", "jumprelu", "relu", "gated"
"""Activations whose codes, penalties and state add up over processes."""


def why_not_sharded(sae: SAE) -> str | None:
    """What of an SAE cannot be divided by latents, if anything."""
    cfg = sae.activation.cfg
    if cfg.name not in SUPPORTED:
        return f'activation "{cfg.name}"'
    return 'gradient "rotation"' if sae.activation.decodes else None


def parallelize(sae: SAE, shards: Shards) -> SAE:
    """Keep this process's latents of an SAE, in place, and have it work with the other processes.

    An SAE on the meta device, which takes no memory, gets uninitialized weights for the latents of
    this process only. From then on, `sae.encode` returns the codes of these latents, as if the
    others were 0 too; outputs and losses are of all latents. ValueError if the SAE cannot be
    divided, or d_sae is not divisible.
    """
    if shards.size == 1:
        return sae
    if shards.latent > 1 and (reason := why_not_sharded(sae)):
        raise ValueError(f"{reason} cannot be divided by latents: use a mesh with latent=1")
    rows = shards.rows(sae.d_sae)
    if sae.W_enc.is_meta:
        sae.activation = sae.activation.cfg.build()
        sae.activation.build(sae.d_in, sae.d_sae)
    for name in per_latent(sae):
        module, _, own = name.rpartition(".")
        _keep_rows(sae.get_submodule(module), own, rows)
    for name, parameter in list(sae.named_parameters()):
        if parameter.is_meta:
            sae.register_parameter(name, nn.Parameter(torch.zeros(parameter.shape)))
    sae.shards = sae.activation.shards = shards
    return sae


def per_latent(sae: SAE) -> list[str]:
    """Names of the parameters and buffers that have one row per latent, of a whole SAE."""
    others = [
        name for name, tensor in sae.activation.state_dict().items()
        if tensor.shape[:1] == (sae.d_sae,)
    ]  # fmt: skip
    return [*PER_LATENT, *(f"activation.{name}" for name in others)]


def _keep_rows(module: nn.Module, name: str, rows: slice) -> None:
    found: Tensor = getattr(module, name)
    own = found.detach()[rows]
    own = torch.empty(own.shape) if own.is_meta else own.clone()
    if isinstance(found, nn.Parameter):
        setattr(module, name, nn.Parameter(own))
    else:
        module.register_buffer(name, own)
