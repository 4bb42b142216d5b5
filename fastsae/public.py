"""What `import fastsae` offers."""

from .codes import Codes
from .data import ActivationShards
from .dropin import accelerate, restore
from .hub import push_to_hub
from .interop import load
from .nn import (
    SAE,
    AbsTopK,
    BatchTopK,
    Crosscoder,
    Gated,
    JumpReLU,
    Rational,
    ReLU,
    TopK,
    Variational,
)
from .train import TrainConfig, Trainer

__all__ = [
    "SAE",
    "AbsTopK",
    "ActivationShards",
    "BatchTopK",
    "Codes",
    "Crosscoder",
    "Gated",
    "JumpReLU",
    "Rational",
    "ReLU",
    "TopK",
    "TrainConfig",
    "Trainer",
    "Variational",
    "accelerate",
    "load",
    "push_to_hub",
    "restore",
]
