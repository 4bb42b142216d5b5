"""Which activations there are, by the name they are saved and chosen under."""

from typing import Any

from fastsae.config import from_dict, to_dict

from .topk import TopK, TopKConfig

ACTIVATIONS = {"topk": (TopK, TopKConfig)}


def activation_to_dict(activation: TopK) -> dict[str, Any]:
    """An activation's name and settings, as JSON values."""
    (name,) = [name for name, (cls, _) in ACTIVATIONS.items() if type(activation) is cls]
    return {"name": name, **to_dict(activation.cfg)}


def activation_from_dict(values: Any) -> TopK:
    """The activation of that name with those settings; ValueError names what is unknown."""
    name = values.get("name") if isinstance(values, dict) else values
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    cls, config = ACTIVATIONS[name]
    settings = from_dict(config, {k: v for k, v in values.items() if k != "name"}, name)
    return cls(**to_dict(settings))
