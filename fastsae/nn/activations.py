"""The activations that can be asked for by name."""

from .activation import CONFIGS, ActivationConfig
from .batchtopk import BatchTopKConfig
from .topk import TopKConfig

CHOICES: dict[str, ActivationConfig] = {
    **{name: config() for name, config in CONFIGS.items()},
    "abstopk": TopKConfig(by="abs"),
    "batchabstopk": BatchTopKConfig(by="abs"),
}
"""Every activation with its default settings, and some variants."""
