"""Which activations there are, by the name they are saved and chosen under."""

from .activation import Activation, ActivationConfig
from .batchtopk import BatchTopK, BatchTopKConfig
from .gated import Gated, GatedConfig
from .jumprelu import JumpReLU, JumpReLUConfig
from .rational import Rational, RationalConfig
from .relu import ReLU, ReLUConfig
from .topk import TopK, TopKConfig
from .variational import Variational, VariationalConfig

ACTIVATIONS: dict[str, tuple[type[Activation], type[ActivationConfig]]] = {
    "topk": (TopK, TopKConfig),
    "batchtopk": (BatchTopK, BatchTopKConfig),
    "jumprelu": (JumpReLU, JumpReLUConfig),
    "relu": (ReLU, ReLUConfig),
    "gated": (Gated, GatedConfig),
    "rational": (Rational, RationalConfig),
    "variational": (Variational, VariationalConfig),
}

CHOICES: dict[str, ActivationConfig] = {
    **{name: config() for name, (_, config) in ACTIVATIONS.items()},
    "abstopk": TopKConfig(by="abs"),
    "batchabstopk": BatchTopKConfig(by="abs"),
}
"""What can be asked for by a name: every activation as it is by default, and some variants."""


def activation_of(cfg: ActivationConfig) -> Activation:
    """The activation with these settings."""
    cls, _ = ACTIVATIONS[cfg.name]
    return cls(**vars(cfg))
