"""Training that starts from the weights of a saved SAE."""

from fastsae.nn import SAE

COEFFICIENT = "activation.coefficient.value"


def check_same_form(sae: SAE, start_from: SAE) -> None:
    """ValueError unless the SAE to start from has the shape and activation of the run, and finite
    weights. A crosscoder may count latents by their norm or have that folded into its weights."""
    wanted, given = (s.shape() | {"activation": s.activation.cfg.name} for s in (sae, start_from))
    if sae.layers > 1:
        given["by_norm"] = True
    if wanted != given:
        raise ValueError(f"the SAE to start from must be {wanted}, got {given}")
    states = sae.state_dict(), start_from.state_dict()
    wanted, given = ({name: list(t.shape) for name, t in state.items()} for state in states)
    for name in sorted(wanted | given):
        if wanted.get(name) != given.get(name):
            raise ValueError(
                f"the SAE to start from must have {name} of shape {wanted.get(name)}, "
                f"got {given.get(name)}"
            )
    for name, weight in start_from.named_parameters():
        if not weight.isfinite().all():
            raise ValueError(f"{name} of the SAE to start from holds NaN or Inf")


def copy_weights_(sae: SAE, start_from: SAE) -> None:
    """Take the weights, and a sparsity coefficient unless one was given for this run."""
    started = start_from.state_dict()
    if getattr(sae.activation.cfg, "l1_coef", None) is not None:
        started[COEFFICIENT] = sae.state_dict()[COEFFICIENT]
    sae.load_state_dict(started)
